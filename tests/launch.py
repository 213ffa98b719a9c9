"""Training in processes of its own, started as users start it."""

import atexit
import functools
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import warm


ROOT = Path(__file__).resolve().parent.parent
# DeepSpeed decorates functions for torch.compile when it starts, which imports torch's compiler: seconds, for nothing.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


@functools.cache
def warm_python() -> tuple[str, ...]:
    """The command before a Python program that is started without its imports, see `warm.py`."""
    if warm.SOCKET not in os.environ:
        folder = tempfile.mkdtemp(prefix="warm-")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/socket")
        listener.listen()
        command = [sys.executable, warm.__file__, "--serve", str(listener.fileno())]
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], cwd=ROOT, env=ENVIRONMENT
        )

        @atexit.register
        def end() -> None:
            server.communicate()
            shutil.rmtree(folder, ignore_errors=True)

        os.environ[warm.SOCKET] = ENVIRONMENT[warm.SOCKET] = f"{folder}/socket"
    return (sys.executable, warm.__file__)


def launcher(config: str, *options: object, num_processes: int = 2, port: int = 0, is_warm: bool = True) -> list[str]:
    """The command before a script: `accelerate launch` with one of the recipes' configurations."""
    if config.startswith(("zero", "multi")) and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles a part of itself when it first runs, and there is no C++ compiler (c++)")
    accelerate = [*warm_python(), "accelerate"] if is_warm else [str(Path(sys.executable).with_name("accelerate"))]
    return [
        *accelerate,
        "launch",
        *("--config_file", str(ROOT / "recipes" / "accelerate" / config)),
        *("--num_processes", str(num_processes)),
        *("--main_process_port", str(port)),  # 0: any that is free
        *map(str, options),
        *(warm_python()[1:] if is_warm else ()),
    ]


def write_settings(folder: Path, name: str, **settings: Any) -> list[str]:
    """The command of `run_canned.py` with these settings; what it leaves behind is in the folder `name`."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"output_dir": str(folder / name), **settings}))
    return [str(Path(__file__).with_name("run_canned.py")), str(file)]


def run_canned(
    folder: Path, name: str, launcher: Sequence[str] = (), **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run `run_canned.py` to its end."""
    return run_to_the_end([*(launcher or warm_python()), *write_settings(folder, name, **settings)])


def run_to_the_end(
    command: Sequence[str],
    timeout: float = 300,
    folder: Path | None = ROOT,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> subprocess.CompletedProcess[str]:
    """Run a command; from the checkout, to which DeepSpeed's own files are named relative, or from another folder.

    `None` is the folder in which the tests are run.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, cwd=folder, env=environment
        )
    except subprocess.TimeoutExpired as expired:
        # the end of it has the stacks of the processes, see warm.py
        said = (expired.stderr or b"").decode(errors="replace")[-20_000:]
        pytest.fail(f"not done in {timeout} s: {command}. On the error stream:\n{said}")


def load_script(file: Path) -> ModuleType:
    """A script as a module, to call its functions."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def ran_on(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What a process of `run_canned.py` has left behind."""
    content: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return content
