"""`trl-grpo-ext launch`: what it says, how it ends, and whom signals reach."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch import launcher, run_to_the_end, warm_python

from trl_grpo_ext.cli import launch, main


# A script of a user, without torch, so that it is there at once. It says what it is called with, and ends as its first
# argument says: with a status, by a signal, or by what comes when it has sent a signal to its launcher alone.
SCRIPT = """
import os, signal, sys

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once, also where two ranks share a pipe

def end(number, frame):
    say("got", signal.Signals(number).name)
    sys.exit(128 + number)

how, *options = sys.argv[1:]
rank = os.environ.get("RANK", "0")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
say("rank", rank, options)
if how.startswith("SIG"):
    signal.alarm(60)
    if rank == "1":
        open(__file__ + ".there", "w").close()
    while "RANK" in os.environ and not os.path.exists(__file__ + ".there"):
        pass  # a process that is being started knows no signals yet
    for name in how.split(",") if rank == "0" else ():
        os.kill(os.getppid(), getattr(signal, name))
    while True:
        signal.pause()
if how.startswith("-"):
    signal.signal(-int(how), signal.SIG_DFL) if how != "-9" else None
    os.kill(os.getpid(), -int(how))
sys.exit(int(how))
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "a script.py"
    file.write_text(SCRIPT)
    return str(file)


@pytest.fixture
def run(capfd):
    """Calls it in this process, and returns its status, output and lines on the error stream."""

    def run(*words):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            launch.main(list(words))
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        said = capfd.readouterr()
        return status, said.out, said.err.splitlines()

    return run


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help(run, words):
    status, said, errors = run(*words)
    assert (status, errors) == (0, [])
    assert said.startswith("usage: trl-grpo-ext launch")


@pytest.mark.parametrize(
    ("words", "status", "names"),
    [
        (["--num_proceses=2", "script.py", "0"], 2, "--num_proceses=2"),
        (["--num_processes", "two", "script.py"], 2, "--num_processes"),
        (["--num_processes", "2"], 2, "training_script"),
        (["--multi_gpu", "--num_processes", "1", "script.py"], 2, "--multi_gpu"),
        (["--config_file", "/no/such.yaml", "script.py"], 1, "/no/such.yaml"),
    ],
)
def test_what_is_wrong_with_its_own_options(run, words, status, names):
    found, said, (line,) = run(*words)
    assert (found, said) == (status, "")
    assert line.startswith("error: ")
    assert names in line


@pytest.mark.parametrize(("how", "status"), [("0", 0), ("1", 1), ("2", 2), ("-9", 137), ("-15", 143)])
def test_it_ends_as_the_script(run, script, how, status):
    """And says nothing of its own, unless the script could not say why it ended."""
    found, said, errors = run(script, how, "--num_processes", "7", "--help", "two words")
    assert (found, said) == (status, "rank 0 ['--num_processes', '7', '--help', 'two words']\n")
    assert len(errors) == how.startswith("-")
    assert all(signal.Signals(-int(how)).name in line for line in errors)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_reaches_the_script(run, script, name, status):
    assert run(script, name) == (status, f"rank 0 []\ngot {name}\n", [])


def test_a_signal_that_has_ended_the_script_is_no_news(run, tmp_path):
    """It could not say so: it was not there yet, or had just ended."""
    file = tmp_path / "script.py"
    file.write_text("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nsignal.alarm(60)\nsignal.pause()\n")
    assert run(str(file)) == (143, "", [])


def test_an_ignored_signal_stays_so(run, script):
    """Of a job in the background, which Ctrl-C is not for."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(script, "SIGINT,SIGTERM") == (143, "rank 0 []\ngot SIGTERM\n", [])
    finally:
        signal.signal(signal.SIGINT, before)


def test_before_there_is_a_script_a_signal_ends_the_launcher(monkeypatch, run):
    """Which leaves alone what the process that calls it has started before."""
    monkeypatch.setattr(launch, "parse", lambda words: signal.raise_signal(signal.SIGTERM))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as another:
        assert run("script.py") == (143, "", [])
        assert another.poll() is None
        another.communicate(b"\n")
    assert another.returncode == 0


def test_ctrl_c_ends_any_subcommand_with_one_line(monkeypatch, capfd):
    monkeypatch.setattr(launch, "main", lambda words: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        main(["launch"])
    assert ended.value.code == 130
    assert "Ctrl-C" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("how", "status"), [("0", 0), ("2", 2), ("-9", 137), ("SIGINT", 130)])
def test_several_processes(script, how, status):
    program = str(Path(sys.executable).with_name("trl-grpo-ext"))
    options = launcher("ddp_cpu.yaml", is_warm=False)[2:]
    result = run_to_the_end([*warm_python(), program, "launch", *options, script, how, "--num_processes"])
    assert result.returncode == status
    for rank in (0, 1) if how == "0" else ():  # else one may have ended the other
        assert f"rank {rank} ['--num_processes']" in result.stdout
    assert len(result.stderr.splitlines()) == (how == "-9"), result.stderr
    assert ("SIGKILL" in result.stderr) == (how == "-9")
