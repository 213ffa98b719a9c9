"""One vLLM for all tests of this process, one server beside it."""

import ctypes
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


# Before vLLM is loaded. TorchDynamo would call a C++ compiler.
os.environ |= {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
if importlib.util.find_spec("vllm") is None:
    pytest.exit("these tests need vLLM and an environment of their own: bash scripts/test_vllm.sh", returncode=4)

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SECONDS_TO_START = 180


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> str:
    """The path of the embedded policy, in fp32: vLLM on CPUs needs heads that are 32 wide or more."""
    from training import save_embedded_policy

    return save_embedded_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def engine():
    """vLLM in this process, as TRL starts it, but in fp32, and once for all trainers: each sends its weights first."""
    from training import share_one_engine

    share_one_engine()
    return {"vllm_mode": "colocate"}


@pytest.fixture(scope="session")
def server(policy, tmp_path_factory):
    """A server, started as TRL's documentation says, but on a CPU; what a trainer needs to know of it."""
    from training import OF_A_RANK, free_port
    from vllm_on_cpu import send_through_store

    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", policy, "--host", "127.0.0.1", "--port", str(port)),
        *("--weight-transfer-config", '{"backend": "store"}', "--worker-extension-cls", "vllm_on_cpu.Extension"),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"),
    ]
    folder = tmp_path_factory.mktemp("server")
    path = os.pathsep.join([str(Path(__file__).parent), name_vllm(folder)])
    environment = os.environ | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"}
    for name in OF_A_RANK:
        environment.pop(name, None)
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True, preexec_fn=end_with_parent
        )
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/health", process, log)
        send_through_store()
        yield {"vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}"}
    finally:
        end(process)


def name_vllm(folder: Path) -> str:
    """A folder in which Python finds metadata of `vllm`: its command asks for its version by that name alone."""
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(folder)


def end_with_parent() -> None:
    """Let Linux end the server with these tests, however they end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_until_it_answers(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.2)


def end(process: subprocess.Popen) -> None:
    """End a server and the processes that it has started, at the latest after half a minute."""
    for sent, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sent)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
