"""Train, be killed at a random moment, and resume: `accelerate launch restarts.py SETTINGS.json`.

Each rank that the launcher starts only imports, and forks the process that trains: so a restart costs no import. What
the launcher does for its processes is done here for the forked ones: when one ends, the others are ended.
"""

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed.runtime.zero.muon.muon_optimizer  # it takes seconds, and DeepSpeed does it late  # noqa: F401
import run_canned
from transformers import TrainerCallback

from trl_grpo_ext.checkpoints import whole_checkpoints
from trl_grpo_ext.ranks import run_as_rank


RANK, NUM_RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class KillInStep(TrainerCallback):
    """SIGKILL at a fraction of a step's time, which is that of the step before; saving is part of it."""

    def __init__(self, after_steps: int, fraction: float) -> None:
        self.after_steps, self.fraction = after_steps, fraction
        self.begin = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        seconds, self.begin = time.monotonic() - self.begin, time.monotonic()
        if self.after_steps == 0:
            threading.Timer(self.fraction * seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        self.after_steps -= 1


def write(file, value):
    part = file.with_name(f"{file.name}.part")
    part.write_text(str(value))
    part.rename(file)


def attempt(settings, number, callbacks):
    """Train in a forked process until it ends, or that of another rank does.

    Returns:
        `list[int]`:
            How each rank's process ended: its exit status, or minus the signal.
    """
    name = f"{settings['output_dir']}.{number}"
    port = Path(f"{name}.port")
    if RANK == 0:
        with socket.socket() as any_free:
            any_free.bind(("127.0.0.1", 0))
            write(port, any_free.getsockname()[1])
    while not port.exists():
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        # A store for each attempt: in the launcher's there is what earlier ones have left.
        os.environ.update(MASTER_PORT=port.read_text(), TORCHELASTIC_USE_AGENT_STORE="False")
        run_as_rank(train_to_the_end, settings, callbacks)
    notes = [Path(f"{name}.{rank}") for rank in range(NUM_RANKS)]
    status = None
    while not all(note.exists() for note in notes):
        if status is None:
            pid, code = os.waitpid(child, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(code)
                write(notes[RANK], status)
            elif any(note.exists() and note.read_text() != "0" for note in notes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [int(note.read_text()) for note in notes]


def train_to_the_end(settings, callbacks):
    resume = bool(whole_checkpoints(settings["output_dir"])[0])
    run_canned.main({**settings, "resume": resume or None}, callbacks)


def main(settings):
    folder = Path(settings["output_dir"])
    straight = {**settings, "output_dir": str(folder) + "-straight", "options": dict(settings["options"])}
    straight["options"]["save_strategy"] = "no"
    assert attempt(straight, 0, []) == [0, 0]
    numbers = random.Random(settings["seed"])  # the same on all ranks
    for number in range(1, settings["kills"] + 2):
        victims = numbers.choice([[0], [1], [0, 1]])
        after_steps, fraction = 1 + numbers.randrange(3), numbers.random()
        is_victim = number <= settings["kills"] and RANK in victims
        statuses = attempt(settings, number, [KillInStep(after_steps, fraction)] if is_victim else [])
        if RANK == 0:
            folder.mkdir(exist_ok=True)
            with (folder / "attempts").open("a") as file:
                print(*statuses, file=file)


if __name__ == "__main__":
    run_as_rank(main, json.loads(Path(sys.argv[1]).read_text()))
