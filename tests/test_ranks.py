"""How the process of a rank ends; what a launcher makes of it is in `distributed/test_faults.py`."""

import json
import os
import subprocess
import sys
import threading

import pytest

from trl_grpo_ext import ranks


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


def test_wrong_arguments_are_said_by_one_rank_and_what_could_not_be_had_by_each(monkeypatch, capsys):
    for rank, status, is_said in ((0, 2, True), (1, 2, False), (1, 1, True)):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ranks.Stop) as stopped:
            ranks.stop(status, "no\nsuch thing")
        assert stopped.value.code == status
        assert stopped.value.line == "error: no such thing"
        assert capsys.readouterr().err == ("error: no such thing\n" if is_said else "")


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        pytest.param("raise", 1, "ends: ValueError: no such thing", marks=pytest.mark.slow),
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


@pytest.fixture
def launch(monkeypatch):
    """Ends as a rank does whose launcher reports and ends after it; returns what stands on the error stream."""

    def launch(failure):
        def main():
            threading.Timer(0.05, launcher.stdin.close).start()
            if failure is not None:
                raise failure

        reading, writing = os.pipe()
        kept = os.dup(2)
        os.dup2(writing, 2)
        script = "import sys; sys.stdin.read(); print('A rank has failed.', file=sys.stderr)"
        launcher = subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE)
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        try:
            if failure is None:
                ranks.run_as_rank(main)
            else:
                with pytest.raises(type(failure)):
                    ranks.run_as_rank(main)
        finally:
            os.dup2(kept, 2)
            os.close(writing)
            os.close(kept)
        with open(reading) as stream:
            words = stream.read()  # until no process holds the stream open
        assert launcher.wait() == 0
        return words

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    return launch


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (ValueError("no\nsuch thing"), "error: ValueError: no such thing"),
        (ranks.Stop(2, "error: wrong"), "error: wrong"),
        (SystemExit("that is all"), "that is all"),
    ],
)
def test_the_cause_is_said_again_after_the_launcher(launch, failure, line):
    assert launch(failure) == f"A rank has failed.\n{line}\n"


@pytest.mark.parametrize("failure", [None, SystemExit(0), SystemExit(3), KeyboardInterrupt()])
def test_there_is_nothing_to_say_again(launch, failure):
    assert launch(failure) == "A rank has failed.\n"


def test_without_a_launcher_nothing_is_said_again(launch, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch(ValueError("no")) == "A rank has failed.\n"


def test_one_rank_of_several_says_it_again(tmp_path, monkeypatch):
    """The first to fail: the others fail because it has, or with the same words."""
    for rank, is_first in ((1, True), (0, False), (1, False)):
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        assert ranks._is_first_to_fail() is is_first


def test_stop_says_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        ranks.stop(2, "not\n  possible")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: not possible\n"


@pytest.mark.parametrize("launched", [True, False])
def test_a_lone_process_ends_with_its_launcher(monkeypatch, launched):
    """And not with the shell that has started it."""
    ended, gone = threading.Event(), threading.Event()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(ranks, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(os, "getppid", lambda: 1 if gone.is_set() else 4_000_000)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())

    def main():
        gone.set()
        assert ended.wait(20 if launched else 0.2) is launched

    ranks.run_as_rank(main)
