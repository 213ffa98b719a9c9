"""Which trackers a process closes that ends without its interpreter's end; a real W&B is in `distributed`."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from trl_grpo_ext.trackers import finish_trackers


class Calls(list):
    """Notes calls, and returns what it was made to."""

    def note(self, name, returns=None):
        def call(*args, **kwargs):
            self.append((name, *args, kwargs) if kwargs else (name, *args))
            return returns

        return call


@pytest.fixture
def calls(monkeypatch):
    """No tracker is loaded but those that a test puts there."""
    for name in ("wandb", "mlflow", "comet_ml", "trackio", "swanlab"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return Calls()


def trackers(calls, is_open):
    """What is used of each of them, as their sources have it, with a run or without."""
    run = SimpleNamespace(end=calls.note("comet"))
    return {
        "wandb": SimpleNamespace(
            run=object() if is_open else None, finish=calls.note("wandb"), teardown=lambda **_: 0
        ),
        "mlflow": SimpleNamespace(active_run=lambda: object() if is_open else None, end_run=calls.note("mlflow")),
        "comet_ml": SimpleNamespace(get_running_experiment=lambda: run if is_open else None),
        "trackio": SimpleNamespace(
            context_vars=SimpleNamespace(current_run=SimpleNamespace(get=lambda: run if is_open else None)),
            finish=calls.note("trackio"),
        ),
        "swanlab": SimpleNamespace(has_run=lambda: is_open, finish=calls.note("swanlab")),
    }


def test_open_ones_are_finished(calls, monkeypatch):
    finish_trackers(0, 60)
    assert calls == []
    assert not {"wandb", "mlflow", "comet_ml"} & set(sys.modules)  # nothing is imported for it
    for name, module in trackers(calls, True).items():
        monkeypatch.setitem(sys.modules, name, module)
    finish_trackers(0, 60)
    assert calls == [("wandb", {"exit_code": 0}), ("mlflow", "FINISHED"), ("comet",), ("trackio",), ("swanlab",)]
    calls.clear()
    finish_trackers(3, 60)
    assert calls == [
        ("wandb", {"exit_code": 3}),
        ("mlflow", "FAILED"),
        ("comet",),
        ("trackio",),
        ("swanlab", {"state": "crashed", "error": "exit status 3"}),
    ]


def test_others_are_left_alone(calls, monkeypatch):
    for name, module in trackers(calls, False).items():
        monkeypatch.setitem(sys.modules, name, module)
    finish_trackers(0, 60)
    assert calls == []


def test_one_that_fails_does_not_keep_the_others(calls, monkeypatch, capsys):
    found = trackers(calls, True)
    found["wandb"].finish = lambda exit_code: 1 / 0
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, found[name])
    finish_trackers(0, 60)
    assert calls == [("trackio",)]
    assert capsys.readouterr().err == "note: wandb could not be finished (ZeroDivisionError: division by zero)\n"


@pytest.mark.slow
def test_one_that_never_ends_does_not_keep_the_process():
    code = (
        "import sys, threading, types\n"
        "from trl_grpo_ext.trackers import finish_trackers\n"
        "sys.modules['mlflow'] = types.SimpleNamespace(active_run=threading.Event().wait)\n"
        "finish_trackers(7, 0.2)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 7
    assert "a tracker was not done within 0.2 s" in result.stderr
