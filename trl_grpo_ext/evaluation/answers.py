r"""Files of answers: JSON Lines, one line a completion, from which all figures can be recomputed without the model.

A line is an object with the keys

- `id`: of the problem, a text or a whole number;
- `sample`: which of the problem's completions it is, from 0; where it is missing, they count in their order;
- `temperature`: at which it was sampled, 0.0 for greedy decoding; may be missing;
- `prompt`: a text or messages; may be missing;
- `completion`: a text; files of others may have messages;
- `answer`: the reference, a text or a number;
- `extracted`, `correct`: by convention what was found, and the verdict, see [`trl_grpo_ext.evaluation.grade`];
- `tokens`: the completion's length, its end included, and `finish_reason`, `"stop"` or `"length"`; where known.

Other keys are left alone. What `trl-grpo-ext grade --lines` writes is read as well.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..rewards.references import reference_to_text
from ..rewards.text import completion_to_text
from ..tasks.files import unpacked_lines
from .grade import CONVENTIONS, grade


FINISH_REASONS = ("stop", "length")
REQUIRED = ("id", "completion", "answer")


@dataclass(kw_only=True)
class Answer:
    """One completion of one problem.

    Args:
        id (`str` or `int`):
            The problem's.
        completion (`str`):
            The text.
        answer (`str` or a number):
            The reference, as the data set has it.
        sample (`int`, *optional*, defaults to `0`):
            Which of the problem's completions at this temperature it is.
        temperature (`float`, *optional*):
            At which it was sampled; 0.0 is greedy decoding.
        prompt (`str` or messages, *optional*):
            What it is the answer to.
        extracted (`dict[str, str | None]`, *optional*), correct (`dict[str, bool]`, *optional*):
            What was found and the verdict, by convention.
        tokens (`int`, *optional*):
            The completion's length, its end token included.
        finish_reason (`str`, *optional*):
            `"stop"` where the policy ended it, `"length"` where it was cut off.
    """

    id: str | int
    completion: str
    answer: Any
    sample: int = 0
    temperature: float | None = None
    prompt: Any = None
    extracted: dict[str, str | None] | None = None
    correct: dict[str, bool] | None = None
    tokens: int | None = None
    finish_reason: str | None = None

    def graded(self) -> "Answer":
        """The same with `extracted` and `correct`, from the completion and the reference."""
        found = grade(self.completion, self.answer)
        return replace(self, extracted=found.extracted, correct=found.correct)

    @classmethod
    def from_dict(cls, line: Any) -> "Answer":
        """From a line of a file.

        Raises:
            ValueError: If a key is missing, or a value is not what it should be.
        """
        if not isinstance(line, Mapping):
            raise ValueError(f"an object with the keys {_listed(REQUIRED)} is expected, not a {type(line).__name__}")
        line = dict(line)
        if "reference" in line and all(isinstance(line.get(name), bool) for name in CONVENTIONS):  # graded before
            line["answer"] = line["reference"]
        missing = [key for key in REQUIRED if key not in line]
        if missing:
            raise ValueError(f"there is no {_listed(missing)}; the keys are {_listed(line) or 'none'}")
        known = {key: line[key] for key in cls.__dataclass_fields__ if line.get(key) is not None or key in REQUIRED}
        for key, is_right, expected in (
            ("id", lambda value: isinstance(value, str) or _is_whole(value), "a text or a whole number"),
            ("completion", lambda value: isinstance(value, str | list | dict), "a text or messages"),
            ("answer", lambda value: reference_to_text(value) is not None, "a text or a number to compare with"),
            ("sample", lambda value: _is_whole(value) and value >= 0, "a whole number from 0"),
            ("temperature", lambda value: _is_number(value) and value >= 0, "a number from 0"),
            ("prompt", lambda value: isinstance(value, str | list | dict), "a text or messages"),
            ("extracted", lambda value: _is_by_convention(value, str | None), "an object of texts"),
            ("correct", lambda value: _is_by_convention(value, bool), "an object of true and false"),
            ("tokens", lambda value: _is_whole(value) and value >= 0, "a whole number from 0"),
            ("finish_reason", lambda value: value in FINISH_REASONS, _listed(FINISH_REASONS, " or ")),
        ):
            if key in known and not is_right(known[key]):
                raise ValueError(f"{key!r} is {shortened(known[key])}, and must be {expected}")
        known["completion"] = completion_to_text(known["completion"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """For a line of a file; what is not known is left out."""
        reference = self.answer
        if isinstance(reference, bool) or not isinstance(reference, str | int | float):
            reference = reference_to_text(reference)
        line = {
            "id": self.id,
            "sample": self.sample,
            "temperature": self.temperature,
            "prompt": self.prompt,
            "completion": self.completion,
            "answer": reference,
            "extracted": self.extracted,
            "correct": self.correct,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
        }
        return {key: value for key, value in line.items() if value is not None}


def read_answers(path: str | os.PathLike[str], *, ignore_unfinished_line: bool = False) -> list[Answer]:
    """All answers of a file, in its order.

    Args:
        path (`str` or `PathLike`):
            The file.
        ignore_unfinished_line (`bool`, *optional*, defaults to `False`):
            Whether the file may end in the middle of a line, as one does whose writer was ended; that line is left
            out.

    Returns:
        `list[Answer]`:
            The answers; where lines have no `sample`, they are numbered.

    Raises:
        ValueError: If a line is not an answer, or two are the same sample or contradict each other; the message names
            the file and the line.
        OSError: If the file cannot be read.
    """
    lines = read_lines(path, ignore_unfinished_line=ignore_unfinished_line)
    return answers_of_lines(path, lines)


def read_lines(path: str | os.PathLike[str], *, ignore_unfinished_line: bool = False) -> dict[int, Any]:
    """The JSON values of a file of JSON Lines by their lines' numbers, from 1; empty lines are left out.

    A file that gzip has packed is unpacked, whatever it is called.
    """
    values = {}
    for number, line in enumerate(unpacked_lines(path), start=1):
        try:
            text = line.decode()
            if text.strip():
                values[number] = json.loads(text)
        except (ValueError, RecursionError) as error:  # also what no UTF-8 is, and numbers that are too long
            if ignore_unfinished_line and not line.endswith(b"\n"):
                break
            cause = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{os.fspath(path)}, line {number}: it is no JSON ({cause})") from error
    return values


def answers_of_lines(path: str | os.PathLike[str], lines: Mapping[int, Any]) -> list[Answer]:
    """Lines of [`read_lines`] as answers, checked and numbered; `path` is for messages."""
    answers = []
    first: dict[tuple[Any, ...], int] = {}  # lines by problem and sample
    first_of: dict[str | int, tuple[int, Answer]] = {}  # the first line of each problem
    unnumbered: dict[tuple[Any, ...], int] = {}
    for number, line in lines.items():
        where = f"{os.fspath(path)}, line {number}"
        try:
            answer = Answer.from_dict(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if line.get("sample") is None:
            key = (answer.id, answer.temperature)
            answer.sample = unnumbered.get(key, 0)
            unnumbered[key] = answer.sample + 1
        before = first.setdefault((answer.id, answer.sample, answer.temperature), number)
        if before != number:
            raise ValueError(
                f"{where}: it is the same sample as line {before} (id {shortened(answer.id)}, sample {answer.sample}"
                f"{'' if answer.temperature is None else f', temperature {answer.temperature:g}'}): leave one out, or "
                "number them"
            )
        number_before, of_same_problem = first_of.setdefault(answer.id, (number, answer))
        for name in ("answer", "prompt"):
            if getattr(answer, name) != getattr(of_same_problem, name):
                raise ValueError(
                    f"{where}: {name!r} is {shortened(getattr(answer, name))} where line {number_before} of the same "
                    f"id {shortened(answer.id)} has {shortened(getattr(of_same_problem, name))}: an id stands for one "
                    "problem"
                )
        answers.append(answer)
    return answers


def write_answers(path: str | os.PathLike[str], answers: Iterable[Answer]) -> None:
    """Write a file, at once or not at all."""
    write_lines(path, (answer.to_dict() for answer in answers))


def write_lines(path: str | os.PathLike[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON Lines, at once or not at all."""
    write_at_once(path, (_to_line(line) for line in lines))


def write_at_once(path: str | os.PathLike[str], parts: Iterable[bytes]) -> None:
    """Write a file whole; whoever reads it meanwhile, or when this is interrupted, finds what was there before."""
    if os.path.exists(path) and not os.path.isfile(path):  # a terminal or a pipe, which must not be replaced
        with open(path, "wb") as stream:
            stream.writelines(parts)
        return
    file = Path(path).resolve()  # what a link names, not the link
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as stream:
            stream.writelines(parts)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def append_answers(path: str | os.PathLike[str], answers: Iterable[Answer]) -> None:
    """Add answers to a file, and have them on the disk before returning.

    The file is made if need be. An unfinished line at its end, which [`read_answers`] can leave out, is cut off.
    """
    lines = b"".join(_to_line(answer.to_dict()) for answer in answers)
    with open(path, "ab+") as file:
        file.truncate(_end_of_whole_lines(file))
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _end_of_whole_lines(file: Any) -> int:
    """Where the last line ends that is whole: with its line break or, without one, as JSON."""
    end, tail = file.seek(0, os.SEEK_END), b""
    size = 65_536
    while len(tail) < end and b"\n" not in tail:
        file.seek(max(0, end - size))
        tail = file.read(size)
        size *= 2
    last = tail[tail.rfind(b"\n") + 1 :]
    try:
        json.loads(last.decode())
    except (ValueError, RecursionError):
        return end - len(last)
    return end


def _to_line(line: Mapping[str, Any]) -> bytes:
    try:
        return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which UTF-8 has no bytes for
        return f"{json.dumps(line)}\n".encode()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_by_convention(value: Any, kind: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(found, kind) for found in value.values())


def _listed(names: Iterable[Any], separator: str = ", ") -> str:
    return separator.join(repr(name) for name in names)


def shortened(value: Any) -> str:
    """A value for a message: its beginning, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
