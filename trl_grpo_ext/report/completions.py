"""Which completions a report shows, and how their texts are marked up. Imports no torch.

Texts of models are hostile: they are cut into [`Segment`]s, in linear time, and the page's template escapes each. What
cannot be seen, or would turn the page's own text around (control characters, marks of writing direction), is named.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..evaluation.answers import Answer, read_answers
from ..evaluation.history import FOLDER, EvaluationRecord, answers_file
from ..rewards.references import reference_to_text
from ..rewards.text import completion_to_text
from .generations import CORRECTNESS
from .record import Run, Sample, shortened
from .summary import convention_of, evaluations_of


RIGHT, WRONG, UNKNOWN = "right", "wrong", "unknown"
PROBLEMS, SAMPLES_OF_GROUP = 8, 4
# Of a text so many tags are marked, and so many characters that cannot be seen; further ones are plain.
MAX_MARKS = 200
# Longer texts are folded: their beginning and end are shown, and all of it on demand.
FOLDED_CHARS, BEGINNING_CHARS, END_CHARS = 900, 420, 260
# Of the classes of problems, how many are shown, in this order; then more of each until there are enough.
SHARES = {"turned right": 3, "stayed wrong": 2, "turned wrong": 1, "truncated": 1, "stayed right": 1}

_TAG = re.compile(r"</?[A-Za-z_][\w.-]{0,40}>")
_HIDDEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff0-\\uffff"
    "\\ud800-\\udfff]"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of a text: `"plain"`, `"tag"`, `"answer"` (what was extracted) or `"hidden"` (a character's name)."""

    kind: str
    text: str


@dataclass(frozen=True)
class Score:
    """What a reward function gave: its name, the score as a text, and whether it is full marks, nothing or between."""

    name: str
    score: str
    verdict: str


@dataclass(frozen=True)
class Shown:
    """A completion on the page.

    Args:
        stage (`str`):
            When, or by which run, it was generated.
        segments (`list[Segment]`):
            Its text, of a long one beginning and end.
        whole (`list[Segment]`):
            All of it, where that was folded; see [`~trl_grpo_ext.report.record.shortened`] for still longer ones.
        chars (`int`):
            Its length.
        verdict (`str`):
            `"right"`, `"wrong"` or `"unknown"`.
        is_truncated (`bool`):
            Whether it was cut off.
        extracted (`str`, *optional*):
            What was taken for the answer.
        tokens (`int`, *optional*), advantage (`float`, *optional*), scores (`list[Score]`):
            What else is known.
    """

    stage: str
    segments: list[Segment]
    whole: list[Segment]
    chars: int
    verdict: str
    is_truncated: bool
    extracted: str | None
    tokens: int | None
    advantage: float | None = None
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A question with completions side by side.

    Args:
        question (`list[Segment]`):
            Its text.
        reference (`str`, *optional*):
            The right answer.
        kind (`str`):
            What became of it, such as `"turned right"`.
        completions (`list[Shown]`):
            By stage, by run, or of one group.
        share (`str`):
            Of how many problems the same became: those that are shown are chosen, and say nothing of it.
    """

    question: list[Segment]
    reference: str | None
    kind: str
    completions: list[Shown]
    share: str = ""


def segments_of(text: str, extracted: str | None = None) -> list[Segment]:
    """A text in stretches, with its first tags and the last place of the extracted answer marked; in linear time."""
    spans: list[tuple[int, int, str]] = []
    if extracted:
        start = text.rfind(extracted)
        if start >= 0:
            spans.append((start, start + len(extracted), "answer"))
    spans += [(found.start(), found.end(), "tag") for found in islice(_TAG.finditer(text), MAX_MARKS)]
    spans += [(found.start(), found.end(), "hidden") for found in islice(_HIDDEN.finditer(text), MAX_MARKS)]
    segments, end = [], 0
    for start, stop, kind in sorted(spans):
        if start < end:  # a tag within the answer
            continue
        if start > end:
            segments.append(Segment("plain", visible(text[end:start])))
        shown = text[start:stop]
        if kind == "answer":
            shown = _HIDDEN.sub(lambda found: _name_of(found[0]), shown)
        segments.append(Segment(kind, _name_of(shown) if kind == "hidden" else shown))
        end = stop
    if end < len(text):
        segments.append(Segment("plain", visible(text[end:])))
    return segments


def visible(text: str) -> str:
    """A text for one line, with characters that cannot be seen named."""
    return _HIDDEN.sub(lambda found: _name_of(found[0]), text)


def _name_of(character: str) -> str:
    return f"[U+{ord(character):04X}]"


def _shown(stage: str, text: str, extracted: str | None, chars: int | None = None, **options: Any) -> Shown:
    chars = len(text) if chars is None else chars
    text = shortened(text)
    whole: list[Segment] = []
    brief = segments_of(text, extracted)
    if len(text) > FOLDED_CHARS:
        whole = brief
        brief = [
            *segments_of(text[:BEGINNING_CHARS]),
            Segment("cut", f" … {chars - BEGINNING_CHARS - END_CHARS:,} more characters … "),
            *segments_of(text[-END_CHARS:], extracted),
        ]
    short = None if extracted is None else visible(extracted if len(extracted) <= 120 else f"{extracted[:120]} …")
    return Shown(stage, brief, whole, chars, extracted=short, **options)


# Answers to held-out problems


def answers_of(run: Run, record: EvaluationRecord) -> list[Answer]:
    """The answers of an evaluation of the first set of problems, graded; none where there is no such file, or it is
    broken."""
    if run.folder is None:
        return []
    file = Path(run.folder, FOLDER, answers_file(record.evaluation, record.step))
    try:
        answers = read_answers(file)
        return [answer if None not in (answer.correct, answer.extracted) else answer.graded() for answer in answers]
    except (OSError, ValueError):
        return []


def first_answers(answers: Sequence[Answer]) -> dict[str, Answer]:
    """One answer a problem, by its id: the greedy one, or else the first sample."""
    found: dict[str, Answer] = {}
    for answer in sorted(answers, key=lambda answer: (answer.temperature != 0, answer.sample)):
        found.setdefault(str(answer.id), answer)
    return found


def stages_of(run: Run) -> list[EvaluationRecord]:
    """Early, middle and late: the first evaluation, the one nearest the middle, and the latest."""
    records = evaluations_of(run)
    if len(records) < 3:
        return records
    middle = (records[0].step + records[-1].step) / 2
    return [records[0], min(records[1:-1], key=lambda record: abs(record.step - middle)), records[-1]]


def heldout_problems(
    stages: Sequence[tuple[str, Sequence[Answer]]], convention: str, *, are_runs: bool = False
) -> list[Problem]:
    """Problems of each kind, with their completions side by side.

    Args:
        stages (`Sequence[tuple[str, Sequence[Answer]]]`):
            What each column is called, and its answers.
        convention (`str`):
            Under which answers are right.
        are_runs (`bool`, *optional*, defaults to `False`):
            Whether columns are runs, and not stages of one.
    """
    columns = [(stage, first_answers(answers)) for stage, answers in stages if answers]
    if not columns:
        return []
    ids = [key for key in columns[-1][1] if all(key in answers for _, answers in columns)]
    names = [stage for stage, _ in columns]
    kind_of = partial(_kind_of_runs, names) if are_runs else _kind_of
    kinds = {key: kind_of([answers[key] for _, answers in columns], convention) for key in ids}
    counts = Counter(kinds.values())
    return [
        Problem(
            question=segments_of(shortened(_question(columns[-1][1][key].prompt))),
            reference=_reference(columns[-1][1][key].answer),
            kind=kinds[key],
            share=f"as {counts[kinds[key]]:,} of {len(ids):,} problems",
            completions=[_of_answer(stage, answers[key], convention) for stage, answers in columns],
        )
        for key in _chosen(kinds)
    ]


def _kind_of(answers: Sequence[Answer], convention: str) -> str:
    first, last = (bool((answer.correct or {}).get(convention)) for answer in (answers[0], answers[-1]))
    if answers[-1].finish_reason == "length":
        return "truncated"
    if len(answers) == 1:
        return RIGHT if last else WRONG
    if first == last:
        return "stayed right" if last else "stayed wrong"
    return "turned right" if last else "turned wrong"


def _kind_of_runs(names: Sequence[str], answers: Sequence[Answer], convention: str) -> str:
    right = [
        name for name, found in zip(names, answers, strict=True) if found.correct and found.correct.get(convention)
    ]
    if not right:
        return "wrong in all runs"
    return "right in all runs" if len(right) == len(names) else f"right in {', '.join(right)} alone"


def _chosen(kinds: Mapping[str, str]) -> list[str]:
    by_kind: dict[str, list[str]] = {kind: [] for kind in SHARES}
    for kind in sorted(set(kinds.values()) - set(SHARES), key=lambda kind: (kind.endswith("all runs"), kind)):
        by_kind[kind] = []
    for key, kind in kinds.items():
        by_kind.setdefault(kind, []).append(key)
    chosen = [key for kind, keys in by_kind.items() for key in keys[: SHARES.get(kind, 2)]]
    rest = [key for keys in by_kind.values() for key in keys if key not in set(chosen)] if len(kinds) < 10_000 else []
    picked = set((chosen + rest)[:PROBLEMS])
    return [key for keys in by_kind.values() for key in keys if key in picked]


def _of_answer(stage: str, answer: Answer, convention: str) -> Shown:
    return _shown(
        stage,
        answer.completion,
        (answer.extracted or {}).get(convention),
        verdict=RIGHT if (answer.correct or {}).get(convention) else WRONG,
        is_truncated=answer.finish_reason == "length",
        tokens=answer.tokens,
    )


def _question(prompt: Any) -> str:
    """The last message, or the whole text."""
    if prompt is None:
        return ""
    last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    if isinstance(last, Mapping):
        return (completion_to_text(last) or str(last.get("content", ""))).strip()
    return (last if isinstance(last, str) else str(last)).strip()


def _reference(reference: Any) -> str | None:
    text = reference_to_text(reference)
    return None if text is None else visible(text if len(text) <= 200 else f"{text[:200]} …")


# Completions of training


def training_problems(run: Run) -> list[Problem]:
    """A group of completions from early, the middle and late in training."""
    with_samples = [generation for generation in run.generations if generation.samples]
    if not with_samples:
        return []
    spots = sorted({0, len(with_samples) // 2, len(with_samples) - 1})
    problems = []
    for spot in spots:
        generation = with_samples[spot]
        groups: dict[tuple[str, str | None], list[Sample]] = {}
        for sample in generation.samples:
            groups.setdefault((sample.prompt, sample.reference), []).append(sample)
        (prompt, reference), samples = max(groups.items(), key=lambda item: _has_signal(item[1]))
        problems.append(
            Problem(
                question=segments_of(shortened(_last_part(prompt))),
                reference=None if reference is None else visible(shortened(reference)),
                kind=f"training, step {generation.step}",
                completions=[_of_sample(run, number, sample) for number, sample in _best_and_worst(samples)],
            )
        )
    return problems


def _has_signal(samples: Sequence[Sample]) -> bool:
    return len({sample.advantage for sample in samples}) > 1


def _best_and_worst(samples: Sequence[Sample]) -> list[tuple[int, Sample]]:
    """At most `SAMPLES_OF_GROUP` of a group, those with the largest and the smallest advantages, in their order."""
    order = sorted(range(len(samples)), key=lambda index: -(samples[index].advantage or 0.0))
    half = SAMPLES_OF_GROUP // 2
    kept = order if len(order) <= SAMPLES_OF_GROUP else [*order[:half], *order[-half:]]
    return [(index + 1, samples[index]) for index in kept]


def _last_part(prompt: str) -> str:
    """The question of a prompt, as [`~trl_grpo_ext.rewards.text.conversation_to_text`] writes messages."""
    return prompt.rpartition("\n\nuser: ")[2].strip() if prompt.startswith("system: ") else prompt.strip()


def _of_sample(run: Run, number: int, sample: Sample) -> Shown:
    abouts = {reward.name: reward for reward in run.rewards}
    scores, verdict = [], UNKNOWN
    for name, score in sample.rewards.items():
        about = abouts.get(name)
        full = about.full_marks if about is not None else None
        if score is None:
            text, found = "not scored", UNKNOWN
        else:
            text = f"{score:g}" if full is None else f"{score:g} of {full:g}"
            found = RIGHT if score > 0 and (full is None or score >= full) else ("part" if score > 0 else WRONG)
        scores.append(Score(visible(name), text, found))
        if about is not None and about.kind == CORRECTNESS and score is not None and verdict != RIGHT:
            verdict = RIGHT if score > 0 else WRONG
    return _shown(
        f"completion {number}",
        sample.completion,
        sample.extracted,
        sample.chars,
        verdict=verdict,
        is_truncated=bool(sample.is_truncated),
        tokens=sample.tokens,
        advantage=sample.advantage,
        scores=tuple(scores),
    )


def judged_by(runs: Sequence[Run]) -> str:
    """The convention under which the runs' answers are right."""
    return convention_of([record for run in runs for record in evaluations_of(run)])
