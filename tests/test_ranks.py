"""How the process of a rank ends; what a launcher makes of it is in `distributed/test_faults.py`."""

import json
import os
import subprocess
import sys

import pytest


SCRIPT = """
import sys
from trl_grpo_ext.ranks import run_as_rank

def main(how):
    if how == "raise":
        raise ValueError("no such thing")
    if how == "connection":
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    if how.isdigit():
        sys.exit(int(how))
    if how == "message":
        sys.exit("that is all")
    print("done", end="")

run_as_rank(main, sys.argv[1])
"""


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("raise", 1, "ends: ValueError: no such thing"),
        pytest.param("return", 0, None, marks=pytest.mark.slow),
        pytest.param("2", 2, None, marks=pytest.mark.slow),
        pytest.param(
            "connection", 1, "ends: it has lost another rank, whose message says why", marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_ends(tmp_path, how, status, message):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == status, result.stderr
    assert result.stdout == ("done" if how == "return" else "")
    if message is None:
        assert "error" not in result.stderr
    else:
        assert "error: rank 1 on " in result.stderr
        assert message in result.stderr
        # where the launcher finds it
        assert "Traceback" in json.dumps(json.loads((tmp_path / "error").read_text()))


@pytest.mark.slow
def test_a_lone_process_is_left_alone():
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, "message"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (1, "that is all\n")
