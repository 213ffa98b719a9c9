"""`record.jsonl`: what a run writes of itself while it trains, one JSON object a line, and how it is read.

Lines are added and never changed, so the file can be read while the run goes on, and is right after a kill, but for
its last line. Each has an `event`:

- `begin`, when training begins or goes on: the `step` from which, `time`, and `about` the run: model, data, rewards,
  settings, versions, machine;
- `about`, when more is known of the run than at its beginning: `step`, and `about`, what is added to it;
- `generation`, for each generation batch: `step`, `statistics` of all its rewards ([`GenerationStatistics`]), and for
  some of them `samples` ([`Sample`]);
- `step`, behind each optimizer step: `step`, `time`, `metrics` by TRL's names and this package's, `seconds` by phase;
- `log`, when the trainer logs: `step`, and `logs`, what is only then known, such as loss and gradient norm;
- `finding`, when the doctor finds something, and when it no longer holds: `step`, `rule`, `holds`, `message`;
- `end`, when training ends: `step`, `time`, `status` (`"finished"` or `"stopped"`).

`time` is in seconds since 1970. `step` counts optimizer steps: that of a generation those before it, of all else those
up to then. A run that goes on from a checkpoint writes into the same file, and what was written behind that step does
not count any more; a run that starts afresh begins a new file. Reading imports no torch.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.history import FIGURES_FILE, EvaluationRecord, read_history
from ..evaluation.history import FOLDER as ANSWERS
from .generations import GenerationStatistics, RewardAbout, checked


RECORD_FILE = "record.jsonl"
FORMAT = 1
# Of a longer text the beginning and the end are kept.
HEAD_CHARS, TAIL_CHARS = 3000, 1000


class RecordError(RuntimeError):
    """There is no record that could be read; the message is one line with what to do."""


@dataclass(frozen=True)
class Sample:
    """A completion of training that was kept.

    Args:
        step (`int`):
            Optimizer steps before it was generated.
        prompt (`str`), completion (`str`):
            Their texts, of long ones beginning and end.
        reference (`str`, *optional*):
            What the reward compares with.
        extracted (`str`, *optional*):
            What the reward took for the answer, where it says so.
        rewards (`dict[str, float | None]`):
            The score of each reward function.
        advantage (`float`, *optional*):
            Its advantage.
        tokens (`int`, *optional*):
            Length of the completion.
        is_truncated (`bool`, *optional*):
            Whether it was cut off at the longest length.
        chars (`int`):
            Length of the completion's whole text.
    """

    step: int
    prompt: str
    completion: str
    reference: str | None
    extracted: str | None
    rewards: dict[str, float | None]
    advantage: float | None
    tokens: int | None
    is_truncated: bool | None
    chars: int

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "step"}


@dataclass(frozen=True)
class Generation:
    """A generation batch: its numbers, and completions of it that were kept, those of a group together."""

    step: int
    statistics: GenerationStatistics
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Step:
    """An optimizer step.

    Args:
        step (`int`):
            Its number, from 1.
        time (`float`):
            When it ended.
        metrics (`dict[str, float]`):
            What was measured in it, by TRL's names and this package's, without those that are not numbers.
        seconds (`dict[str, float]`):
            On the main process: `generation`, `rewards` and `update` within the step, and `between`, what lay between
            the step before and this one (evaluations, saving, logging).
    """

    step: int
    time: float
    metrics: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Log:
    """What the trainer logged at a step: `loss`, `grad_norm`, `learning_rate` and others that steps do not have."""

    step: int
    logs: dict[str, float]


@dataclass(frozen=True)
class FindingEvent:
    """What the doctor said during training, see [`trl_grpo_ext.report.doctor`]."""

    step: int
    rule: str
    holds: bool
    message: str


@dataclass
class Run:
    """A run as its record tells it, and as far as it has come.

    Args:
        folder (`Path`, *optional*):
            Its output folder.
        about (`dict[str, Any]`):
            What it is: `model`, `dataset`, `rewards` (of [`RewardAbout`]), `settings`, `versions`, `processes`,
            `device` and others. The latest beginning's.
        steps (`list[Step]`), generations (`list[Generation]`), logs (`list[Log]`), findings (`list[FindingEvent]`):
            In the order of steps.
        evaluations (`list[EvaluationRecord]`):
            Figures of held-out problems, of `answers/figures.jsonl`.
        begins (`list[tuple[int, float]]`):
            Step and time of each beginning.
        end (`dict[str, Any]`, *optional*):
            How it ended; `None` while it goes on, or if it was killed.
        unreadable_lines (`int`):
            Lines of the file that are no events: half of one, where a run was killed.
    """

    folder: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    findings: list[FindingEvent] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    begins: list[tuple[int, float]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    unreadable_lines: int = 0

    @property
    def name(self) -> str:
        return self.folder.resolve().name if self.folder is not None else "run"

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    @property
    def rewards(self) -> list[RewardAbout]:
        return [RewardAbout(**reward) for reward in self.about.get("rewards", [])]

    @property
    def settings(self) -> dict[str, Any]:
        return self.about.get("settings", {})

    def series(self, name: str) -> list[tuple[int, float]]:
        """A metric by step, from steps and, where these have none, from logs."""
        found = [(step.step, step.metrics[name]) for step in self.steps if name in step.metrics]
        return found or [(log.step, log.logs[name]) for log in self.logs if name in log.logs]

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in an event; raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for what is none."""
        kind, step = event["event"], int(event["step"])
        if kind == "begin":
            about = dict(event["about"])
            [checked(RewardAbout(**reward)) for reward in about.get("rewards", [])]
            self.begins.append((step, float(event["time"])))
            self.about, self.end = about, None
            self._forget_behind(step)
        elif kind == "about":
            self.about = {**self.about, **event["about"]}
        elif kind == "generation":
            samples = tuple(checked(Sample(step=step, **sample)) for sample in event.get("samples", ()))
            self.generations.append(Generation(step, GenerationStatistics.from_dict(event["statistics"]), samples))
        elif kind == "step":
            numbers = _numbers(event["metrics"]), _numbers(event["seconds"])
            self.steps.append(Step(step, float(event["time"]), *numbers))
        elif kind == "log":
            self.logs.append(Log(step, _numbers(event["logs"])))
        elif kind == "finding":
            self.findings.append(FindingEvent(step, str(event["rule"]), bool(event["holds"]), str(event["message"])))
        elif kind == "end":
            self.end = dict(event)
        else:
            raise ValueError(f"there is no event {kind!r}")

    def _forget_behind(self, step: int) -> None:
        self.steps = [item for item in self.steps if item.step <= step]
        self.logs = [item for item in self.logs if item.step <= step]
        self.findings = [item for item in self.findings if item.step <= step]
        self.generations = [item for item in self.generations if item.step < step]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        sys.intern(name): float(value)  # a name is in memory once, and not at each step anew
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def read_record(run: str | os.PathLike[str]) -> Run:
    """Read a run's record.

    Args:
        run (`str` or `PathLike`):
            The run's output folder, or the file itself.

    Raises:
        RecordError: If there is no record, or nothing in it can be read.
    """
    path = Path(run)
    file = path / RECORD_FILE if path.is_dir() else path
    try:
        lines = file.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RecordError(
            f"{str(path)!r} has no {RECORD_FILE} ({error.strerror or error}): name the output folder of a run of "
            "GRPOExtTrainer, or add RunRecordCallback to another trainer"
        ) from error
    found = Run(folder=file.parent)
    with lines:
        for line in lines:
            if line.strip():
                try:
                    found.add(json.loads(line))
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
                    found.unreadable_lines += 1
    if not found.begins:
        raise RecordError(f"{str(file)!r} is no record of a run: nothing in it says how a run began")
    found.evaluations = read_history(file.parent / ANSWERS / FIGURES_FILE)
    return found


def to_line(event: Mapping[str, Any]) -> str:
    """An event as a line of the file; what is no finite number becomes `null`."""
    return json.dumps(_plain(event), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_text(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    return _text(value)


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode("utf-8")  # lone surrogates are no UTF-8


def shortened(text: str) -> str:
    """A text, or of a long one its beginning and its end, with how much is missing."""
    if len(text) <= HEAD_CHARS + TAIL_CHARS:
        return text
    return (
        f"{text[:HEAD_CHARS]}\n[... {len(text) - HEAD_CHARS - TAIL_CHARS:,} characters left out ...]\n"
        f"{text[-TAIL_CHARS:]}"
    )
