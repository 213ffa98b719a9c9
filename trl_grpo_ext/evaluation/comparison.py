"""Two sets of answers to the same problems: which is better, and can it be told?

Problems are paired, because what makes one problem harder than another is the same in both sets: the difference is
known far better than either figure. It has an interval by the paired bootstrap and, where each problem has one
completion, a p-value by McNemar's exact test on the problems that one set alone has right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..rewards.references import reference_to_text
from ..rewards.text import completion_to_text
from .answers import Answer, shortened
from .figures import MAIN, by_problem, is_right, prefix_of, split, values_of_samples
from .grade import CONVENTIONS
from .statistics import LEVEL, mcnemar, paired_bootstrap


if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Difference:
    """A figure of both sets, over the problems that both have.

    Args:
        a (`float`), b (`float`):
            The figure of each, 0 to 1.
        difference (`float`), low (`float`), high (`float`):
            That of `b` minus that of `a`, and its 95 % interval.
        only_a (`int` or `None`), only_b (`int` or `None`):
            Number of problems that are right there alone, where each problem has one completion.
        p (`float` or `None`):
            McNemar's p-value, in the same case.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    only_a: int | None = None
    only_b: int | None = None
    p: float | None = None

    @property
    def better(self) -> str | None:
        """`"a"` or `"b"`, or `None` where no difference can be told."""
        if self.low <= 0 <= self.high or (self.p is not None and self.p > 1 - LEVEL):
            return None
        return "b" if self.difference > 0 else "a"


@dataclass(frozen=True)
class Comparison:
    """What [`compare_answers`] found.

    Args:
        items (`int`):
            Number of problems that both sets have.
        unpaired_a (`int`), unpaired_b (`int`):
            Number of problems that are in one set alone, and so are left out.
        kind_a (`str`), kind_b (`str`):
            Which completions the conventions compare: `"greedy"`, `"sampled at 1"` or `"of unknown temperature"`.
        differences (`dict[str, Difference]`):
            By the names of [`trl_grpo_ext.evaluation.figures`]: the four conventions, and the figures of samples.
    """

    items: int
    unpaired_a: int
    unpaired_b: int
    kind_a: str
    kind_b: str
    differences: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        content = asdict(self)
        differences = content.pop("differences")
        return {**content, **differences}

    def conclusion(self, convention: str = MAIN, names: tuple[str, str] = ("a", "b")) -> list[str]:
        """In sentences: what a convention says, and which others say something else.

        Args:
            convention (`str`, *optional*, defaults to `"answer"`):
                The one to go by.
            names (`tuple[str, str]`, *optional*):
                What the two sets are called.
        """
        found = self.differences[convention]
        sentences = [_sentence(found, convention, names)]
        for other in CONVENTIONS:
            if self.differences[other].better != found.better:
                sentences.append(_sentence(self.differences[other], other, names))
        return sentences


def compare_answers(
    a: Sequence[Answer], b: Sequence[Answer], *, ignore_prompts: bool = False, seed: int = 0
) -> Comparison:
    """Compare two sets of answers, problem by problem.

    Args:
        a (`Sequence[Answer]`), b (`Sequence[Answer]`):
            Graded answers. The conventions compare greedy completions where both sets have some, and otherwise those
            that [`figures_of`] takes.
        ignore_prompts (`bool`, *optional*, defaults to `False`):
            Whether an id may stand beside different questions: where the prompts, not the models, are compared.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `Comparison`:
            The differences.

    Raises:
        ValueError: If no problem is in both sets, or an id stands for different problems.

    Example:
    ```python
    >>> a = [Answer(id=n, completion="<answer>24</answer>", answer="14").graded() for n in range(4)]
    >>> b = [Answer(id=n, completion="<answer>14</answer>", answer="14").graded() for n in range(4)]
    >>> found = compare_answers(a, b).differences["strict"]
    >>> found.a, found.b, found.only_b
    (0.0, 1.0, 4)
    ```
    """
    problems_a, problems_b = _problems(a), _problems(b)
    ids = [key for key in problems_a if key in problems_b]
    if not ids:
        raise ValueError(
            f"no problem is in both: the first ids are {_beginning(problems_a)} and {_beginning(problems_b)}"
        )
    for key in ids:
        _check_same(key, problems_a[key][0], problems_b[key][0], ignore_prompts)
    (greedy_a, sampled_a), (greedy_b, sampled_b) = (
        split([answer for key in ids for answer in problems[key]]) for problems in (problems_a, problems_b)
    )
    main_a, main_b = greedy_a or sampled_a, greedy_b or sampled_b
    if not (greedy_a and greedy_b) and sampled_a and sampled_b:
        main_a, main_b = sampled_a, sampled_b
    completions = _pairs(main_a, main_b)
    if not completions[0]:
        raise ValueError("no problem has greedy completions in both")
    differences = _differences_of_completions(*completions, seed)
    samples = _pairs(sampled_a, sampled_b)
    num_samples = min((len(answers) for problems in samples for answers in problems), default=0)
    if num_samples > 1:
        for convention in (MAIN, *(convention for convention in CONVENTIONS if convention != MAIN)):
            values_a, values_b = (values_of_samples(problems, convention, num_samples) for problems in samples)
            found = _differences(values_a, values_b, seed)
            differences |= {f"{prefix_of(convention)}{name}": value for name, value in found.items()}
    return Comparison(
        items=len(ids),
        unpaired_a=len(problems_a) - len(ids),
        unpaired_b=len(problems_b) - len(ids),
        kind_a=_kind(main_a),
        kind_b=_kind(main_b),
        differences=differences,
    )


def comparison_table(comparison: Comparison, convention: str = MAIN, names: tuple[str, str] = ("a", "b")) -> "Table":
    """A comparison as a table, in percent and points: the conventions, and the samples' figures under one of them."""
    from rich.table import Table

    table = Table()
    table.add_column("figure, %", overflow="fold")
    has_tests = any(found.p is not None for found in comparison.differences.values())
    headings = [*names, f"{names[1]} - {names[0]}", "95 %", *([f"only {', '.join(names)}", "p"] if has_tests else [])]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    prefix = prefix_of(convention)
    for name, found in comparison.differences.items():
        is_of_samples = "@" in name
        if is_of_samples and name.partition("@")[0] not in (f"{prefix}{kind}" for kind in ("mean", "pass", "maj")):
            continue
        table.add_row(
            name,
            f"{100 * found.a:.1f}",
            f"{100 * found.b:.1f}",
            f"{100 * found.difference:+.1f}",
            f"{100 * found.low:.1f} to {100 * found.high:.1f}",
            *([] if found.p is None else [f"{found.only_a}, {found.only_b}", _p_value(found.p)]),
            end_section=name == CONVENTIONS[-1],
        )
    return table


def _problems(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Each problem's answers by its id, as a text: one writer's numbers are another's texts."""
    problems: dict[str, list[Answer]] = {}
    for found in by_problem(answers):
        if problems.setdefault(str(found[0].id), found) is not found:
            raise ValueError(f"one of them has the id {shortened(str(found[0].id))} both as a text and as a number")
    return problems


def _pairs(a: Sequence[Answer], b: Sequence[Answer]) -> tuple[list[list[Answer]], list[list[Answer]]]:
    """The answers to the problems that have some on both sides, in the same order."""
    problems_a, problems_b = _problems(a), _problems(b)
    ids = [key for key in problems_a if key in problems_b]
    return [problems_a[key] for key in ids], [problems_b[key] for key in ids]


def _check_same(key: str, a: Answer, b: Answer, ignore_prompts: bool) -> None:
    references = reference_to_text(a.answer), reference_to_text(b.answer)
    if references[0] != references[1]:
        one, other = map(shortened, references)
        raise ValueError(f"id {shortened(key)} has the reference {one} in one and {other} in the other")
    if ignore_prompts or a.prompt is None or b.prompt is None:
        return
    questions = [_question(answer.prompt) for answer in (a, b)]
    if questions[0] != questions[1]:
        one, other = map(shortened, questions)
        raise ValueError(f"id {shortened(key)} has the prompt {one} in one and {other} in the other")


def _question(prompt: Any) -> str:
    """The last message, or the whole text: system prompts and worked examples in messages may differ."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    return (last if isinstance(last, str) else completion_to_text(last)).strip()


def _differences_of_completions(a: list[list[Answer]], b: list[list[Answer]], seed: int) -> dict[str, Difference]:
    values_a, values_b = (
        {
            convention: np.array(
                [sum(is_right(answer, convention) for answer in answers) / len(answers) for answers in problems]
            )
            for convention in CONVENTIONS
        }
        for problems in (a, b)
    )
    have_one_each = all(len(answers) == 1 for problems in (a, b) for answers in problems)
    return _differences(values_a, values_b, seed, are_verdicts=have_one_each)


def _differences(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], seed: int, are_verdicts: bool = False
) -> dict[str, Difference]:
    bounds = paired_bootstrap(list(a.values()), list(b.values()), seed=seed)
    found = {}
    for name, difference, low, high in zip(a, *bounds, strict=True):
        test: dict[str, Any] = {}
        if are_verdicts:
            only_a, only_b = int((a[name] > b[name]).sum()), int((b[name] > a[name]).sum())
            test = {"only_a": only_a, "only_b": only_b, "p": mcnemar(only_a, only_b)}
        means = float(a[name].mean()), float(b[name].mean())
        found[name] = Difference(*means, float(difference), float(low), float(high), **test)
    return found


def _sentence(found: Difference, convention: str, names: tuple[str, str]) -> str:
    if found.better is None:
        return f"No difference can be told under {convention}: {_in_points(found)}."
    better = names[0] if found.better == "a" else names[1]
    return f"{better} is better under {convention}: {_in_points(found)}."


def _in_points(found: Difference) -> str:
    points = f"{100 * found.difference:+.1f} points ({100 * found.low:.1f} to {100 * found.high:.1f})"
    if found.p is None:
        return points
    return f"{points}, p < 0.001" if found.p < 0.001 else f"{points}, p = {_p_value(found.p)}"


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _kind(answers: Sequence[Answer]) -> str:
    temperature = answers[0].temperature
    if temperature is None:
        return "of unknown temperature"
    return "greedy" if temperature == 0 else f"sampled at {temperature:g}"


def _beginning(problems: Mapping[str, Any]) -> str:
    return ", ".join(shortened(key) for key in list(problems)[:3]) or "none"
