"""What the subcommands that read answers have in common: files that cannot be had end with one line and status 1."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exits import stop


if TYPE_CHECKING:
    from ..evaluation.answers import Answer


@dataclass
class BootstrapArguments:
    """What intervals depend on."""

    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")


def graded_answers(path: str, lines: Mapping[int, Any]) -> "list[Answer]":
    """The lines of a file as answers, graded anew, with a progress bar on a screen."""
    from tqdm import tqdm

    from ..evaluation.answers import answers_of_lines

    try:
        answers = answers_of_lines(path, lines)
    except ValueError as error:
        stop(1, error)
    if not answers:
        stop(1, f"{path} has no answers in it")
    bar = tqdm(answers, desc=f"Grading {os.path.basename(path)}", unit="answer", disable=None, delay=0.5, leave=False)
    return [answer.graded() for answer in bar]


def lines_of(path: str) -> dict[int, Any]:
    """The lines of a file."""
    from ..evaluation.answers import read_lines

    try:
        return read_lines(path)
    except ValueError as error:
        stop(1, error)
    except OSError as error:
        stop(1, f"{path}: {error.strerror}")


def check_outputs(inputs: Mapping[str, str], outputs: Mapping[str, str | None]) -> None:
    """End before anything is read if a file to write cannot be, or would be written over another one.

    Args:
        inputs (`Mapping[str, str]`):
            Files that are read, by what they are called on the command line.
        outputs (`Mapping[str, str | None]`):
            Files that are asked for, likewise.
    """
    taken = {Path(path).resolve(): name for name, path in inputs.items()}
    for name, path in outputs.items():
        if path is None:
            continue
        if not path:
            stop(2, f"{name}: the file's name is missing")
        if Path(path).is_dir():
            stop(2, f"{name}: {path!r} is a folder; name a file")
        if not Path(path).parent.is_dir():
            stop(1, f"{name}: there is no folder {str(Path(path).parent)!r}")
        other = taken.setdefault(Path(path).resolve(), name)
        if other != name:
            stop(2, f"{name} names the same file as {other}, and would overwrite it: choose another one")


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a file, at once or not at all."""
    from ..evaluation.answers import write_at_once

    try:
        write_at_once(path, [f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()])
    except OSError as error:
        stop(1, f"{path}: {error.strerror}")
