"""Ctrl-C and SIGTERM: when they end a process, what is saved before, and the command that goes on."""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from canned import assert_same_weights, canned_config, canned_prompts, train_canned
from launch import ENVIRONMENT, ROOT, launcher, run_to_the_end, warm_python
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import TrainerCallback

from trl_grpo_ext import signals
from trl_grpo_ext.checkpoints import find_unresumable, whole_checkpoints
from trl_grpo_ext.cli.launch import end_as
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.interrupt import SaveOnInterrupt
from trl_grpo_ext.ranks import run_as_rank
from trl_grpo_ext.report.record import read_record
from trl_grpo_ext.screen import hide_no_news
from trl_grpo_ext.signals import Interrupted, Signals, command_that_goes_on
from trl_grpo_ext.trainer import GRPOExtTrainer


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def send(number):
    """To this process; its handler has been called when this returns."""
    signal.raise_signal(number)


@pytest.fixture
def ended(monkeypatch):
    """The statuses with which the thread would have ended this process."""
    statuses = []
    monkeypatch.setattr(signals.os, "_exit", statuses.append)
    monkeypatch.setattr(signals, "SECONDS_OF_ECHO", 0.0)
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", signals.LAUNCHER_VARIABLE, "RANK"):
        monkeypatch.delenv(name, raising=False)
    return statuses


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_where_nothing_is_to_be_saved_the_first_one_ends_it(ended, capfd, number, status):
    before = signal.getsignal(number)
    with Signals() as waiting:
        waiting.goes_on = "the last checkpoint is there"
        with pytest.raises(Interrupted) as stopped:
            send(number)
    assert stopped.value.code == status
    assert capfd.readouterr().err == f"{stopped.value.line}\n"
    assert stopped.value.line.endswith(": the last checkpoint is there")
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_deferred_one_waits_and_a_second_one_ends_it(ended, capfd):
    with Signals() as waiting:
        waiting.is_deferred = True
        send(signal.SIGINT)
        wait_until(lambda: waiting.number == signal.SIGINT)
        assert ended == []
        send(signal.SIGTERM)
        wait_until(lambda: ended == [143])
    said = capfd.readouterr().err
    assert f"kill {os.getpid()}" in said
    assert "without saving" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [({"TORCHELASTIC_RUN_ID": "none"}, "SECONDS_OF_ECHO_WHERE_PASSED_ON"), ({}, "SECONDS_OF_ECHO")],
)
def test_what_is_passed_on_is_the_same_signal(ended, monkeypatch, variables, seconds):
    """By a launcher, and by `timeout`, which sends it twice."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(signals, seconds, 60.0)
    monkeypatch.setattr(signals, "SECONDS_UNTIL_SAID_UNDER_TORCHRUN", 0.0)
    with Signals() as waiting:
        waiting.is_deferred = True
        send(signal.SIGINT)
        send(signal.SIGINT)
        waiting.request(0)  # the thread has looked at both when it has ended
        waiting._thread.join()
        assert (waiting.number, ended) == (signal.SIGINT, [])


def test_it_says_when_it_takes_long(ended, capfd, monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_UNTIL_SAID", 0.01)
    said = []
    monkeypatch.setattr(signals, "say", said.append)
    with Signals() as waiting:
        waiting.is_deferred, waiting.doing = True, "step 7"
        send(signal.SIGTERM)
        wait_until(lambda: len(said) == 2)
    assert "still at step 7" in said[1]
    assert ended == []


def test_a_process_that_does_not_end_is_ended(ended, monkeypatch):
    """Something has swallowed the exception, or waits for what never comes."""
    monkeypatch.setattr(signals, "SECONDS_TO_END", 0.01)
    with Signals():
        with pytest.raises(Interrupted):
            send(signal.SIGINT)
        wait_until(lambda: ended[:1] == [130])


def test_outside_of_training_no_step_is_waited_for(ended):
    """Where an exception has ended it: else the first signal would be left to a trainer that is gone."""
    with Signals() as waiting:
        with waiting:
            waiting.is_deferred = True
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_signals_of_others_are_left_alone(ended, monkeypatch):
    def handler(number, frame):
        calls.append(number)

    calls = []
    before = signal.signal(signal.SIGTERM, handler), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as waiting:
            assert not waiting.is_on
            send(signal.SIGTERM)
            send(signal.SIGINT)
        assert (calls, waiting.number) == ([signal.SIGTERM], None)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    # nor is any waited for in another thread, or Ctrl-C in a notebook
    found = []
    thread = threading.Thread(target=lambda: found.append(Signals().__enter__().is_on))
    thread.start()
    thread.join()
    assert found == [False]
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with Signals():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_forked_process_has_signals_of_its_own(ended):
    """The workers of a data loader, for one: what ends them is not what ends the run."""
    with signals.SIGNALS as waiting:
        waiting.is_deferred = True
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert not signals.select.select([waiting._reading], [], [], 0)[0]
        assert waiting.number is None


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["accelerate", "launch", "run.py"], "accelerate launch run.py --resume_from_checkpoint latest"),
        (
            ["python", "run.py", "--resume_from_checkpoint", "out/checkpoint-3", "--run_name", "my run"],
            "python run.py --run_name 'my run' --resume_from_checkpoint latest",
        ),
        (["run.py", "--resume_from_checkpoint=auto"], "run.py --resume_from_checkpoint latest"),
    ],
)
def test_the_command_that_goes_on(words, command):
    assert command_that_goes_on(words) == command


def test_the_command_of_a_script_that_starts_ours(monkeypatch):
    """Its options are this process's own, whatever is in them."""
    options = ["--run_name", 'it\'s a "run"\tof mine', ""]
    monkeypatch.setattr(sys, "argv", ["recipes/gsm8k.py", *options])
    monkeypatch.setenv(signals.COMMAND_VARIABLE, "bash 'my folder/demo.sh'")
    command = command_that_goes_on(signals.command_line())
    assert shlex.split(command) == ["bash", "my folder/demo.sh", *options, "--resume_from_checkpoint", "latest"]


@pytest.mark.parametrize(
    ("parent", "is_launcher"),
    [
        (["/venv/bin/python", "/venv/bin/accelerate", "launch", "run.py"], True),
        (["/venv/bin/python3", "-m", "trl_grpo_ext", "grpo"], True),
        (["python", "-u", "-m", "torch.distributed.run", "run.py"], True),
        (["python", "-m", "trlx"], False),
        (["bash", "demo.sh"], False),
        (["/bin/bash"], False),
        ([], False),
    ],
)
def test_what_a_launcher_is(parent, is_launcher):
    assert signals._is_launcher(parent) is is_launcher


@pytest.mark.parametrize(("ended_as", "status", "says"), [(2, 2, ""), (143, 143, ""), (-9, 137, "SIGKILL")])
def test_a_launcher_ends_as_its_process(capsys, ended_as, status, says):
    with pytest.raises(SystemExit) as stopped:
        end_as(ended_as)
    assert stopped.value.code == status
    said = capsys.readouterr().err
    assert says in said
    assert bool(said) is bool(says)  # a process that has ended by itself has said why


def test_only_what_is_no_news_is_left_out(caplog):
    hide_no_news()
    logger = logging.getLogger("DeepSpeed")
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logger.warning("Something else.")
    assert [record.getMessage() for record in caplog.records if record.name == "DeepSpeed"] == ["Something else."]


def test_the_last_line_stands_behind_progress_bars(capfd):
    """Which end with what has made them."""

    def main():
        bar = tqdm([1, 2], leave=True)
        for _ in bar:
            send(signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        run_as_rank(main)
    assert capfd.readouterr().err.splitlines()[-1] == stopped.value.line


# Training


class SendAt(TrainerCallback):
    """Sends a signal to this process, by default in the middle of a step."""

    def __init__(self, at_step, event="on_substep_end"):
        self.at_step, self.arguments_of_training = at_step, None
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.at_step and signals.SIGNALS.number is None:
            self.arguments_of_training = args
            send(signal.SIGTERM)


class Interruptible(GRPOExtTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SaveOnInterrupt(self, "go on"))


def train(policy, folder, *, sending=None, resume=None, **options):
    options = {
        "num_iterations": 3,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_strategy": "no",
        **options,
    }
    callbacks = [] if sending is None else [sending]
    config = canned_config(folder, GRPOExtConfig, **options)
    problems = canned_prompts().select(range(2)) if "eval_strategy" in options else None
    return train_canned(Interruptible, config, policy, resume=resume, callbacks=callbacks, eval_dataset=problems)


@pytest.mark.parametrize("options", [{}, {"save_strategy": "steps", "save_steps": 50, "save_only_model": True}])
def test_a_run_that_was_interrupted_goes_on_exactly(ended, policy, tmp_path, capfd, options):
    """In the middle of the passes over a batch of rollouts."""
    straight = train(policy, tmp_path / "straight")
    sending = SendAt(3)
    with pytest.raises(Interrupted) as stopped:
        train(policy, tmp_path / "out", sending=sending, **options)
    assert sending.arguments_of_training.save_only_model == options.get("save_only_model", False)
    assert stopped.value.code == 143
    assert stopped.value.line.endswith(f"saved in {tmp_path / 'out' / 'checkpoint-4'}; to go on: go on")
    assert stopped.value.line in capfd.readouterr().err
    assert list(whole_checkpoints(tmp_path / "out")[0]) == [4]
    assert find_unresumable(tmp_path / "out" / "checkpoint-4") is None
    assert not signals.SIGNALS.is_on
    resumed = train(policy, tmp_path / "out", resume=True)
    assert resumed.trainer.state.global_step == 6
    assert_same_weights(resumed.weights, straight.weights)
    assert ended == []


@pytest.mark.parametrize(
    ("event", "options"),
    [
        ("on_evaluate", {"eval_strategy": "steps", "eval_steps": 2}),
        ("on_save", {"save_strategy": "steps", "save_steps": 2}),
        ("on_evaluate", {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}),
    ],
)
def test_behind_a_step_no_further_one_is_waited_for(ended, policy, tmp_path, event, options):
    """While it is evaluated or saved; the last one, too, is saved."""
    sending = SendAt(2, event)
    with pytest.raises(Interrupted) as stopped:
        train(policy, tmp_path, sending=sending, **options)
    assert f"after step 2, saved in {tmp_path / 'checkpoint-2'};" in stopped.value.line
    assert find_unresumable(tmp_path / "checkpoint-2") is None
    assert read_record(tmp_path).end["status"] == ("finished" if options.get("max_steps") == 2 else "stopped")


def test_sigterm_is_left_to_transformers(ended, policy, tmp_path):
    """With `enable_jit_checkpoint`, which waits for some seconds first: here the run is over by then."""
    run = train(policy, tmp_path, enable_jit_checkpoint=True, max_steps=1)
    assert run.trainer.state.global_step == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# The recipe, as users start it and as a terminal interrupts it

STEPS = 9
SMALL = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 48,
    "eval_items": 4,
    "eval_samples": 0,
    "train_items": 64,
    "cpu_threads": 1,
    "save_strategy": "no",
}
ENVIRONMENT_WITH_PATH = {**ENVIRONMENT, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
RECIPE = str(ROOT / "recipes" / "gsm8k.py")


def arguments_of(output_dir):
    return [word for name, value in {**SMALL, "output_dir": output_dir}.items() for word in (f"--{name}", str(value))]


def interrupt(command, number, *, whole_group):
    """Start a command, send it a signal in one of its middle steps, and wait for all its processes.

    Returns:
        `tuple[int, str]`:
            Its exit status, and what was on the error stream.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT_WITH_PATH,
        cwd=ROOT,
        start_new_session=True,
    )
    said = b""
    try:
        while not re.search(rb" [2-6]/9 ", said):  # the bar does not show each step
            part = os.read(process.stderr.fileno(), 65536)
            assert part, said.decode()
            said += part
        if whole_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said += process.communicate(timeout=120)[1]  # to the end of whoever holds the stream
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, said.decode()


def command_that_is_said(said, folder, command):
    """Checks what is there behind an interruption, and returns the command that goes on."""
    (step,) = whole_checkpoints(folder)[0]
    assert 2 <= step < STEPS
    assert find_unresumable(folder / f"checkpoint-{step}") is None
    last_line = said.rstrip("\n").split("\n")[-1]
    assert last_line.startswith("ended by ")
    assert str(folder / f"checkpoint-{step}") in last_line
    assert not (folder / "summary.json").exists()
    assert "Evaluating after" not in said
    words = shlex.split(last_line.partition("to go on: ")[2])
    assert words[1:] == [*command[1:], "--resume_from_checkpoint", "latest"]
    assert Path(words[0]).name == Path(command[0]).name
    return words


@pytest.mark.slow
@pytest.mark.distributed
def test_the_recipe(tmp_path):
    """Exactly: it ends with the weights of a run that was not interrupted."""
    straight = run_to_the_end([*warm_python(), RECIPE, *arguments_of(tmp_path / "straight")])
    assert straight.returncode == 0, straight.stderr[-3000:]
    folder = tmp_path / "it's mine"
    command = [sys.executable, RECIPE, *arguments_of(folder)]
    status, said = interrupt(command, signal.SIGTERM, whole_group=False)
    assert status == 143
    assert "Traceback" not in said
    resumed = run_to_the_end(command_that_is_said(said, folder, command), environment=ENVIRONMENT_WITH_PATH)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_weights(*(load_file(path / "model.safetensors") for path in (folder, tmp_path / "straight")))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_recipe_under_accelerate_launch(tmp_path):
    """As a terminal interrupts it: all its processes."""
    command = ["accelerate", "launch", RECIPE, *arguments_of(tmp_path)]
    _, said = interrupt(command, signal.SIGINT, whole_group=True)
    assert f'File "{RECIPE}"' not in said  # what there is is the launcher's own
    assert said.count("Traceback") <= 1
    command_that_is_said(said, tmp_path, command)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_recipe_on_two_processes(tmp_path):
    """Ctrl-C reaches the launcher, and by it both ranks."""
    options = launcher("ddp_cpu.yaml", is_warm=False)[1:]
    command = ["trl-grpo-ext", *options, RECIPE, *arguments_of(tmp_path)]
    status, said = interrupt(command, signal.SIGINT, whole_group=True)
    assert status == 130
    assert "Traceback" not in said
    resumed = run_to_the_end(command_that_is_said(said, tmp_path, command), environment=ENVIRONMENT_WITH_PATH)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"{STEPS} optimizer steps" in resumed.stdout
