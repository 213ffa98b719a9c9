"""`figures.jsonl`: the figures of a run's evaluations, in their order. Imports no torch."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .figures import Figures


FOLDER = "answers"
FIGURES_FILE = "figures.jsonl"
BEFORE, STEP, AFTER = "before", "step", "after"


@dataclass(frozen=True)
class EvaluationRecord:
    """One line of `figures.jsonl`: figures of a set, with their intervals.

    Args:
        evaluation (`str`):
            `"before"`, `"step"` or `"after"`.
        step (`int`):
            Optimizer steps that the policy has taken.
        set (`str`):
            Name of the set of problems.
        figures ([`Figures`]):
            What came out.
    """

    evaluation: str
    step: int
    set: str
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        content = {"evaluation": self.evaluation, "step": self.step, "set": self.set}
        return {**content, "figures": self.figures.to_dict()}

    @classmethod
    def from_line(cls, line: str) -> "EvaluationRecord | None":
        """A line's record; `None` if it is not one: of a file that was not written here, or by another version."""
        try:
            content = json.loads(line)
            figures = Figures.from_dict(content["figures"])
            numbers = [
                figures.items,
                *(value for found in figures.estimates.values() for value in vars(found).values()),
            ]
            if not all(map(math.isfinite, numbers)):
                return None
            return cls(str(content["evaluation"]), int(content["step"]), str(content["set"]), figures)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None


def answers_file(evaluation: str, step: int, set_name: str | None = None) -> str:
    """The name of the file of an evaluation's answers; those of the first set of problems have no set's name in it."""
    stem = f"{STEP}-{step:06d}" if evaluation == STEP else evaluation
    return f"{stem}.jsonl" if set_name is None else f"{stem}.{set_name}.jsonl"


def read_history(file: str | os.PathLike[str]) -> list[EvaluationRecord]:
    """The records of a file, without what is none; nothing where there is no file."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [record for line in lines if (record := EvaluationRecord.from_line(line))]
