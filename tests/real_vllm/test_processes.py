"""vLLM in processes of their own: several ranks, and the recipe."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from launch import ROOT, launcher


HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(ROOT)])}


def run(command, timeout=240):
    """Run a command to its end, and end what it has started with it."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0)
            print(output.read()[-10_000:])
    assert process.returncode == 0


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_two_ranks(policy, request, tmp_path, mode):
    """Each with a vLLM of its own, or both with one server, to which the first one sends weights for both."""
    options = {"vllm_mode": "colocate"}
    if mode == "server":
        options = {**request.getfixturevalue("server"), "generation_kwargs": {"seed": 0}}
    settings = {"policy": policy, "output_dir": str(tmp_path), "options": {**options, "num_iterations": 2}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run([*launcher("ddp_cpu.yaml", is_warm=False), str(HERE / "on_ranks.py"), str(tmp_path / "settings.json")])
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        assert found["processes"] == 2
        assert found["wrapper"] == "DistributedDataParallel"
        assert found["mean_lengths"]["ours"] == found["mean_lengths"]["theirs"]
        assert found["grad_norms"]["ours"] == pytest.approx(found["grad_norms"]["theirs"], rel=1e-4, abs=1e-9)
        assert found["relative_difference"] < 1e-4
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert max(ranks[0]["logp_differences"]) < 1e-4


def test_recipe(tmp_path):
    vllm = ["--use_vllm", "true", "--vllm_mode", "colocate"]
    config = ["--config", str(ROOT / "recipes" / "configs" / "offline-tiny.yaml"), "--output_dir", str(tmp_path)]
    run([sys.executable, str(HERE / "recipe.py"), *config, *vllm])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"]["before"]["strict"]["mean"] < 0.4
    assert summary["accuracy"]["after"]["strict"]["mean"] > 0.9
