import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pool_tasks
import pytest
from launch import ROOT

from trl_grpo_ext.rewards.worker_pool import Outcome, WorkerError, WorkerPool, close_workers, usable_cores


TASK = "pool_tasks:do"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
SCRIPT = """
import os, signal, sys
from trl_grpo_ext.rewards.worker_pool import WorkerPool

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
how, marker = sys.argv[1:]
pool = WorkerPool("pool_tasks:do", timeout_s=3600, workers=2)
assert [outcome.value for outcome in pool.map([1, 2, 3])] == [1, 2, 3]
if how == "end":
    sys.exit()
if how == "exception":
    raise ValueError("as it happens")
pool.map([["hang", marker], "sleep"])
"""


def workers_of(pid: int) -> list[int]:
    """The worker processes that a process has started, by what stands in their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(part.endswith(b"worker_process.py") for part in command) and str(pid).encode() in command:
            found.append(int(folder.name))
    return found


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(TASK, timeout_s=1.0, workers=2, memory_limit_mb=256) as pool:
        yield pool


def test_every_way_to_fail(pool):
    """Each item has its own end, in order, and the others are none the worse for it."""
    ends = {
        "hang": "deadline",
        "sleep": "deadline",
        "exit": "died",
        "crash": "died",
        "memory": "memory",
        "stack": "error: RecursionError: ",
        "leave": "error: SystemExit: 3",
        "no JSON": "error: TypeError: ",
    }
    items = [part for what in ends for part in (f"before {what}", what, {"after": [what, None, 0.5]})]
    started = time.monotonic()
    outcomes = pool.map(items)
    # four that run over or nearly so, on two workers, each within its deadline and a second
    assert time.monotonic() - started < 4 * 2.0
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(item, str) and item in ends:
            assert outcome.value is None
            assert outcome.failure.startswith(ends[item]), (item, outcome)
        else:
            assert outcome == Outcome(item)
    wait_until(lambda: len(workers_of(os.getpid())) == 2)  # those that were replaced too


def test_one_hanging_item_takes_its_deadline(pool):
    pool.map(["ready"])
    started = time.monotonic()
    assert pool.map(["hang"]) == [Outcome(None, "deadline")]
    assert 1.0 <= time.monotonic() - started < 2.0
    started = time.monotonic()
    assert pool.map([["sleep", 0.2]], timeout_s=0.1) == [Outcome(None, "deadline")]
    assert time.monotonic() - started < 1.1


def test_nothing_to_do(pool):
    assert pool.map([]) == []
    with pytest.raises(TypeError):
        pool.map([object()])


def test_what_is_printed_and_large_items(pool, capfd):
    large = "\ud800x" * 300_000
    assert [outcome.value for outcome in pool.map(["print", large, large])] == ["print", large, large]
    assert "printed by a task" not in capfd.readouterr().out


def test_a_worker_is_no_part_of_the_training(pool, monkeypatch):
    """No torch, no GPU, no rank; and its own group, which Ctrl-C does not reach."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("A_KEY_OF_MINE", "kept")
    with WorkerPool(TASK, workers=1) as other:
        about = other.map(["about"])[0].value
    assert not {"torch", "trl", "transformers", "numpy", "trl_grpo_ext"} & set(about["modules"])
    assert about["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert about["environment"]["A_KEY_OF_MINE"] == "kept"
    assert not {"RANK", "MASTER_ADDR", "LOCAL_WORLD_SIZE"} & set(about["environment"])


def test_workers_are_kept_and_closed():
    pool = WorkerPool(pool_tasks.do, workers=1)
    first, second = (pool.map(["about"])[0].value["pid"] for _ in range(2))
    assert first == second
    close_workers()
    assert first not in workers_of(os.getpid())
    assert pool.map([1]) == [Outcome(1)]
    del pool
    assert not workers_of(os.getpid())


def test_a_task_that_is_made_in_the_worker():
    with WorkerPool("pool_tasks:make", options={"greeting": "hello"}, workers=1) as pool:
        assert pool.map(["you"]) == [Outcome("hello you")]


def test_workers_that_cannot_be_started():
    """Said at once, and not tried for ever."""
    with (
        WorkerPool("no_such_module:do", workers=1, name="mine") as pool,
        pytest.raises(WorkerError, match=r"mine cannot be started: ModuleNotFoundError: .*no_such_module"),
    ):
        pool.map([1])
    with (
        WorkerPool("pool_tasks:die_at_start", options={}, workers=1) as pool,
        pytest.raises(WorkerError, match="status 5 before it was ready"),
    ):
        pool.map([1])
    with (
        WorkerPool("pool_tasks:sleep_at_start", options={}, workers=1, start_timeout_s=0.2) as pool,
        pytest.raises(WorkerError, match=r"not ready in 0\.2 s"),
    ):
        pool.map([1])
    assert not workers_of(os.getpid())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout_s": 0}, "timeout_s must be a number of seconds above 0, got 0"),
        ({"timeout_s": float("inf")}, "timeout_s must be"),
        ({"workers": 0}, "workers must be a whole number above 0, or None, got 0"),
        ({"workers": 1.5}, "workers must be"),
        ({"memory_limit_mb": -1}, "memory_limit_mb must be"),
        ({"task": "pool_tasks.do"}, "task must be like 'package.module:function', got 'pool_tasks.do'"),
        ({"task": lambda item: item}, "task must be a function at the top of a module"),
    ],
)
def test_options_that_cannot_be_used(options, said):
    with pytest.raises(ValueError, match=r"^mine: ") as raised:
        WorkerPool(**{"task": TASK, "name": "mine", **options})
    assert said in str(raised.value)


def test_workers_are_shared_out_over_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert usable_cores() == 12
    for processes, cores in (("4", 3), ("16", 1), ("0", 12), ("many", 12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert usable_cores() == cores


@pytest.mark.slow
def test_two_threads_take_turns(pool):
    """The one with few items need not wait for all of the one with many."""
    many = threading.Thread(target=pool.map, args=([["sleep", 0.05]] * 40,))
    pool.map([1, 2])
    many.start()
    started = time.monotonic()
    assert pool.map(["a", "b", "c", "d"]) == [Outcome(letter) for letter in "abcd"]
    assert time.monotonic() - started < 0.7  # all of the many take 1.0 s
    many.join()


def test_a_forked_process_has_workers_of_its_own(pool):
    """And does not end its parent's, nor keep them from seeing that it has ended."""
    (parents,) = pool.map(["about"])
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            (mine,) = pool.map(["about"], timeout_s=20)
            os.write(write, f"{mine.value['pid']}".encode())
            pool.close()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        childs = int(file.read())
    assert os.waitpid(pid, 0)[1] == 0
    assert childs != parents.value["pid"]
    assert not workers_of(pid)
    assert pool.map([1, 2, 3]) == [Outcome(1), Outcome(2), Outcome(3)]
    assert parents.value["pid"] in workers_of(os.getpid())


def run_script(how: str, marker: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how, str(marker)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_nothing_is_left_of_a_process_that_is_killed(tmp_path, number):
    """While one worker hangs in C code and another sleeps."""
    process = run_script("hang", tmp_path / "marker")
    try:
        wait_until((tmp_path / "marker").exists)
        assert len(workers_of(process.pid)) == 2
        process.send_signal(number)
        process.communicate(timeout=20)
    finally:
        process.kill()
    wait_until(lambda: not workers_of(process.pid), seconds=5)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("end", 0), ("exception", 1)])
def test_nothing_is_left_of_a_process_that_ends(tmp_path, how, status):
    process = run_script(how, tmp_path / "marker")
    _, said = process.communicate(timeout=20)
    assert process.returncode == status
    assert said == "" if how == "end" else said.strip().endswith("as it happens")
    assert not workers_of(process.pid)


def test_a_worker_that_has_grown_is_not_used_again():
    """What an item has left in memory would decide how the next one ends."""
    with WorkerPool(TASK, workers=1, memory_limit_mb=100) as pool:
        items = [["keep", 2**20], "about", ["keep", 60 * 2**20], "about"]
        small, first, large, second = pool.map(items)
    assert small.failure is large.failure is None
    assert first.value["pid"] != second.value["pid"]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_workers():
    """Nor on which item a worker had before, and what that has left behind."""
    items = [what for index in range(8) for what in (index, "exit" if index % 3 == 0 else "memory")]
    seen = []
    for workers in (1, 2, 5):
        with WorkerPool(TASK, workers=workers, memory_limit_mb=100, timeout_s=20) as pool:
            seen.append(pool.map(items))
    assert seen[0] == seen[1] == seen[2]
    assert [outcome.failure for outcome in seen[0][1::2]] == [
        "died" if index % 3 == 0 else "memory" for index in range(8)
    ]
