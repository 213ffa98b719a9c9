"""What ends a run: every process ends soon, the message names rank and cause, and what was saved goes on exactly."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from canned import assert_same_weights
from launch import ROOT, launcher, ran_on, run_canned, run_to_the_end, write_settings
from safetensors.torch import load_file

from trl_grpo_ext.checkpoints import whole_checkpoints


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# steps in the middle of the passes over a batch of rollouts, and in the middle of a pass
OPTIONS = {
    "num_iterations": 3,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "bf16": False,
}
# Seconds in which the others end when one process has. The launcher notices within a tenth of a second, and gives them
# 30 seconds to end; those that wait in a collective call end at once.
BOUND_S = 45


def assert_same_end(found: Path, expected: Path) -> None:
    assert_same_weights(*(load_file(folder / "final.safetensors") for folder in (found, expected)))


@pytest.mark.parametrize(
    ("config", "kill_ranks", "lora"),
    [("ddp_cpu.yaml", [1], True), ("zero3_cpu.yaml", [0, 1], False)],  # ZeRO-2: test_killed_at_twenty_moments
)
def test_killed_and_resumed_is_exact(policy, tmp_path, config, kill_ranks, lora):
    command = launcher(config)
    settings = {"policy": policy, "options": OPTIONS, "lora": lora}
    straight, killed = (
        {**settings, "output_dir": str(tmp_path / name), **more}
        for name, more in (("straight", {}), ("killed", {"kill_at": 5, "kill_ranks": kill_ranks}))
    )
    result = run_canned(tmp_path, "settings", command, runs=[straight, killed])
    assert result.returncode != 0
    assert "Root Cause" in result.stderr
    assert f"local_rank: {kill_ranks[0]}" in result.stderr or len(kill_ranks) > 1
    assert "SIGKILL" in result.stderr
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    assert max(whole_checkpoints(tmp_path / "killed")[0]) == 5
    resumed = run_canned(tmp_path, "killed", command, resume=True, **settings)
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    assert ran_on(tmp_path / "killed")["processes"] == 2
    sharding = ran_on(tmp_path / "killed")["sharding"]
    assert (sharding and sharding["stage"]) == {"zero3_cpu.yaml": 3}.get(config)
    # it went on in the middle of the passes: it did not count from 0, and not from a generation
    assert [entry["step"] for entry in ran_on(tmp_path / "killed")["log"] if "loss" in entry] == list(range(1, 9))
    assert_same_end(tmp_path / "killed", tmp_path / "straight")


def test_a_rank_whose_reward_raises(policy, tmp_path):
    begin = time.monotonic()
    result = run_canned(
        tmp_path, "out", launcher("ddp_cpu.yaml"), policy=policy, options={"bf16": False}, reward_fails_on=1
    )
    assert time.monotonic() - begin < 60 + BOUND_S
    assert result.returncode != 0
    assert "error: rank 1 on" in result.stderr
    assert "ends: ZeroDivisionError: this reward cannot divide" in result.stderr
    # the launcher says it again, at the end
    root_cause = result.stderr[result.stderr.index("Root Cause") :]
    assert "rank      : 1" in root_cause
    assert "ZeroDivisionError: this reward cannot divide" in root_cause
    # and so does the rank: it is the last thing on the screen
    last_line = result.stderr.rstrip("\n").split("\n")[-1]
    assert last_line.startswith("error: rank 1 on")
    assert last_line.endswith("ends: ZeroDivisionError: this reward cannot divide")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float, process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.05)


def test_ranks_end_with_their_launcher(policy, tmp_path):
    """A launcher that is killed cannot end its processes: they would train on, next to the run that is resumed."""
    settings = write_settings(tmp_path, "out", policy=policy, options={"bf16": False}, stay_at=1)
    command = [*launcher("ddp_cpu.yaml", is_warm=False), *settings]  # what is forked is not the launcher's child
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT, text=True)
        pid_files = [tmp_path / "out" / f"rank-{rank}.pid" for rank in (0, 1)]
        try:
            wait_until(lambda: all(file.is_file() and file.read_text() for file in pid_files), 120, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    pids = [int(file.read_text()) for file in pid_files]
    try:
        wait_until(lambda: not any(map(is_running, pids)), 5)
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)
    messages = (tmp_path / "stderr").read_text()
    for rank in (0, 1):
        assert f"error: rank {rank} on" in messages
    assert f"ends: its launcher, process {process.pid}, is gone" in messages


def test_killed_at_twenty_moments(policy, tmp_path):
    """ZeRO-2, killed at moments drawn from a seed, in a step or while it saves: as if nothing had happened."""
    settings = write_settings(
        tmp_path,
        "out",
        policy=policy,
        options={**OPTIONS, "max_steps": 64, "save_total_limit": 2, "logging_steps": 64},
        kills=20,
        seed=0,
    )[1]
    script = str(Path(__file__).with_name("restarts.py"))
    result = run_to_the_end([*launcher("zero2.yaml", "--mixed_precision", "no"), script, settings])
    assert result.returncode == 0, result.stderr[-5000:]
    assert ran_on(tmp_path / "out")["sharding"]["stage"] == 2
    attempts = [line.split() for line in (tmp_path / "out" / "attempts").read_text().splitlines()]
    assert len(attempts) == 21
    assert all("-9" in statuses for statuses in attempts[:20])
    assert attempts[20] == ["0", "0"]
    assert_same_end(tmp_path / "out", tmp_path / "out-straight")
