"""Answers to figures: shares of right answers, pass@k, maj@k, each with its 95 % interval.

Which answers a figure is about:

- `strict`, `answer`, `lm_eval_strict`, `lm_eval_flexible` ([`trl_grpo_ext.evaluation.grade`]), `format`, `truncated`
  and `tokens` are about the greedy completions where there are some beside sampled ones, and about all of them
  otherwise: the share of right completions; the share with something in a closed answer tag; the share that was cut
  off at the longest length, and the mean length in tokens, where each completion says so.
- `mean@n`, `pass@k`, `maj@k`, `never_right` and `always_right` are about the sampled completions, where each problem
  has n > 1 of them, under the convention `answer`: the mean share of right samples (what `pass@1` is too), pass@k and
  maj@k for k = 1 (pass@k alone), 2, 4, ... (maj@k to 64) and n, and the shares of problems of which no sample is
  right, and each one. Those under other conventions have its name before: `strict_mean@4`. Where problems have
  different numbers of samples, n is the smallest; pass@k and maj@k are means over all subsets of k of whatever samples
  a problem has. Problems without any sample (an evaluation that was interrupted) are not in these figures.

Intervals: Wilson's for shares of which each problem has one verdict; otherwise the bootstrap over problems, because a
problem's answers are not independent of each other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..rewards.numbers import parse_answer_number
from .answers import Answer
from .grade import CONVENTIONS, INVALID
from .statistics import bootstrap_interval, majority_at_k, pass_at_k, wilson_interval


if TYPE_CHECKING:
    from rich.table import Table


# The convention whose figures of samples have no name before them.
MAIN = "answer"
# Larger majorities than of this many samples are not counted, but for that of all.
MAX_VOTES = 64


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What answers to a set of problems come to; see the module for the names.

    Args:
        items (`int`):
            Number of problems.
        completions (`int`):
            Number of completions.
        samples_per_item (`int`):
            Number of completions of each problem beside greedy ones, the smallest if they differ; 0 without any.
        estimates (`dict[str, Estimate]`):
            The figures by their names. All are shares from 0 to 1, but for `tokens`.
    """

    items: int
    completions: int
    samples_per_item: int
    estimates: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """For a file: the numbers, and an object of `mean`, `low` and `high` for each figure."""
        return {
            "items": self.items,
            "completions": self.completions,
            "samples_per_item": self.samples_per_item,
            **{name: asdict(estimate) for name, estimate in self.estimates.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Figures":
        """From what [`to_dict`] gives."""
        return cls(
            items=content["items"],
            completions=content["completions"],
            samples_per_item=content["samples_per_item"],
            estimates={name: Estimate(**value) for name, value in content.items() if isinstance(value, Mapping)},
        )

    def to_logs(self, prefix: str = "eval_") -> dict[str, float]:
        """The means, for a tracker; of the samples' figures under other conventions only `strict_mean@n`."""
        return {f"{prefix}{name}": estimate.mean for name, estimate in self.estimates.items() if _is_shown(name)}


def figures_of(answers: Iterable[Answer], *, seed: int = 0) -> Figures:
    """Count answers.

    Args:
        answers (`Iterable[Answer]`):
            The answers to all problems, in any order, which does not show. Those without verdicts are graded.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `Figures`:
            See the module.

    Raises:
        ValueError: If there are no answers, one is there twice, or samples are of several temperatures.

    Example:
    ```python
    >>> answers = [Answer(id=n, completion="<answer>14</answer>", answer="14") for n in range(4)]
    >>> figures_of(answers).estimates["strict"].mean
    1.0
    ```
    """
    answers = [answer if answer.correct is not None else answer.graded() for answer in answers]
    if not answers:
        raise ValueError("there are no answers to count")
    if len({(answer.id, answer.sample, answer.temperature) for answer in answers}) < len(answers):
        raise ValueError("an answer is there twice: each needs a sample of its own within a problem")
    greedy, sampled = split(answers)
    estimates = _figures_of_completions(by_problem(greedy or sampled), seed)
    problems = by_problem(sampled)
    samples_per_item = min((len(found) for found in problems), default=0)
    if samples_per_item > 1:
        estimates |= _figures_of_samples(problems, seed)
    return Figures(
        items=len({answer.id for answer in answers}),
        completions=len(answers),
        samples_per_item=samples_per_item,
        estimates=estimates,
    )


def split(answers: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """The greedy completions, and the others; several greedy ones of a problem, without others, count as samples.

    Raises:
        ValueError: If the others are of several temperatures.
    """
    greedy = [answer for answer in answers if answer.temperature == 0]
    sampled = [answer for answer in answers if answer.temperature != 0]
    temperatures = {answer.temperature for answer in sampled}
    if len(temperatures) > 1:
        named = sorted("unknown" if value is None else f"{value:g}" for value in temperatures)
        raise ValueError(
            f"the samples are of several temperatures ({', '.join(named)}), and figures are of one: keep them apart"
        )
    if not sampled and len({answer.id for answer in greedy}) < len(greedy):
        return [], greedy
    return greedy, sampled


def by_problem(answers: Iterable[Answer]) -> list[list[Answer]]:
    """Each problem's answers."""
    found: dict[str | int, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.id, []).append(answer)
    return list(found.values())


def sizes_of_subsets(num_samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})


def values_of_samples(
    problems: Sequence[Sequence[Answer]], convention: str, num_samples: int
) -> dict[str, np.ndarray]:
    """Each problem's mean@n, pass@k and maj@k, by these names.

    Args:
        problems (`Sequence[Sequence[Answer]]`):
            Each problem's graded samples.
        convention (`str`):
            Under which they are right.
        num_samples (`int`):
            The smallest number of samples of a problem.
    """
    n = np.array([len(answers) for answers in problems])
    verdicts = [[is_right(answer, convention) for answer in answers] for answers in problems]
    right = np.array([sum(found) for found in verdicts])
    votes = [[_vote(answer, convention) for answer in answers] for answers in problems]
    sizes = sizes_of_subsets(num_samples)
    values = {f"mean@{num_samples}": right / n}
    values |= {f"pass@{k}": pass_at_k(n, right, k) for k in sizes}
    for k in [k for k in sizes[1:] if k <= MAX_VOTES or k == n.max()]:
        majority = [majority_at_k(of_problem, found, k) for of_problem, found in zip(votes, verdicts, strict=True)]
        values[f"maj@{k}"] = np.array(majority)
    return values


def table_of(figures: Figures | Mapping[str, Figures], *, is_short: bool = False) -> "Table":
    """Figures as a table, in percent: the mean, and beside it the interval.

    Of the samples' figures those under the convention `answer` and `strict_mean@n`; the others are in the figures.

    Args:
        figures (`Figures` or `Mapping[str, Figures]`):
            One set, or several by their names, side by side.
        is_short (`bool`, *optional*, defaults to `False`):
            Only what a run is judged by: `strict`, its mean over samples and `pass@n` for the most of them, and the
            completions' format and length.
    """
    from rich.table import Table

    sets = {"": figures} if isinstance(figures, Figures) else dict(figures)
    table = Table()
    table.add_column("figure", no_wrap=True)
    for name in sets:
        table.add_column(name or "%", justify="right", no_wrap=True)
        table.add_column("95 %", justify="left", no_wrap=True)
    shown = dict.fromkeys(name for found in sets.values() for name in found.estimates if _is_shown(name))
    names = sorted(_most_important(shown) if is_short else shown, key=_section_of)
    for name, following in zip(names, [*names[1:], *names[-1:]], strict=True):
        cells = [cell for found in sets.values() for cell in _cells(name, found.estimates.get(name))]
        table.add_row(name, *cells, end_section=_section_of(name) != _section_of(following))
    return table


def _cells(name: str, estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    scale = 1 if name == "tokens" else 100
    return f"{scale * estimate.mean:.1f}", f"{scale * estimate.low:.1f} to {scale * estimate.high:.1f}"


def _section_of(name: str) -> int:
    if name in CONVENTIONS:
        return 0
    return 2 if _is_of_samples(name) else 1


def _is_of_samples(name: str) -> bool:
    return "@" in name or name.endswith(("never_right", "always_right"))


def _is_shown(name: str) -> bool:
    """Whether a figure is one of the few for a table or a tracker: of samples, one convention's are enough."""
    prefixes = tuple(prefix_of(convention) for convention in CONVENTIONS if convention != MAIN)
    return not _is_of_samples(name) or name.startswith("strict_mean@") or not name.startswith(prefixes)


def _most_important(names: Iterable[str]) -> list[str]:
    names = list(names)
    samples = max((int(name.partition("@")[2]) for name in names if name.startswith("mean@")), default=0)
    important = ("strict", f"strict_mean@{samples}", f"pass@{samples}", "format", "truncated", "tokens")
    return [name for name in names if name in important]


def prefix_of(convention: str) -> str:
    """What stands before the names of a convention's figures of samples."""
    return "" if convention == MAIN else f"{convention}_"


def _figures_of_completions(problems: list[list[Answer]], seed: int) -> dict[str, Estimate]:
    answers = [answer for of_problem in problems for answer in of_problem]
    are_ends_known = all(answer.finish_reason is not None for answer in answers)
    are_lengths_known = all(answer.tokens is not None for answer in answers)

    def count(of_problem: list[Answer]) -> dict[str, int]:
        counts = {name: sum(is_right(answer, name) for answer in of_problem) for name in CONVENTIONS}
        counts["format"] = sum((answer.extracted or {}).get("strict") is not None for answer in of_problem)
        if are_ends_known:
            counts["truncated"] = sum(answer.finish_reason == "length" for answer in of_problem)
        if are_lengths_known:
            counts["tokens"] = sum(answer.tokens or 0 for answer in of_problem)
        return counts

    counted = [count(of_problem) for of_problem in problems]
    counts = {name: np.array([found[name] for found in counted]) for name in counted[0]}
    sizes = np.array([len(of_problem) for of_problem in problems])
    shares = [name for name in counts if name != "tokens"]
    if (sizes == 1).all():
        low, high = wilson_interval([counts[name].sum() for name in shares], len(problems))
    else:
        low, high = bootstrap_interval([counts[name] / sizes for name in shares], sizes=sizes, seed=seed)
    estimates = _estimates(shares, [counts[name].sum() / len(answers) for name in shares], low, high)
    if are_lengths_known:
        bounds = bootstrap_interval(counts["tokens"] / sizes, sizes=sizes, seed=seed, are_shares=False)
        estimates["tokens"] = Estimate(float(counts["tokens"].sum() / len(answers)), *bounds)
    return estimates


def _figures_of_samples(problems: list[list[Answer]], seed: int) -> dict[str, Estimate]:
    num_samples = min(map(len, problems))
    means: dict[str, np.ndarray] = {}
    never_and_always: dict[str, np.ndarray] = {}
    order = []
    for convention in (MAIN, *(convention for convention in CONVENTIONS if convention != MAIN)):
        prefix = prefix_of(convention)
        values = {
            f"{prefix}{name}": value for name, value in values_of_samples(problems, convention, num_samples).items()
        }
        means |= values
        shares = values[f"{prefix}mean@{num_samples}"]
        never_and_always |= {f"{prefix}never_right": shares == 0, f"{prefix}always_right": shares == 1}
        order += [*values, f"{prefix}never_right", f"{prefix}always_right"]
    estimates = _estimates(
        list(means),
        [math.fsum(values) / len(problems) for values in means.values()],  # whose order does not show
        *bootstrap_interval(list(means.values()), seed=seed),
    )
    counts = np.array([share.sum() for share in never_and_always.values()])
    estimates |= _estimates(list(never_and_always), counts / len(problems), *wilson_interval(counts, len(problems)))
    return {name: estimates[name] for name in order}


def _estimates(names: Sequence[str], means: Any, low: Any, high: Any) -> dict[str, Estimate]:
    return {name: Estimate(*map(float, bounds)) for name, *bounds in zip(names, means, low, high, strict=True)}


def is_right(answer: Answer, convention: str) -> bool:
    """Whether an answer, which is graded, is right under a convention."""
    assert answer.correct is not None
    return answer.correct[convention]


def _vote(answer: Answer, convention: str) -> Any:
    """What an answer votes for: a number, if it is one, or its text; `None` for nothing."""
    assert answer.extracted is not None
    text = answer.extracted[convention]
    return None if text in (None, INVALID) else _class_of(text)


@lru_cache(maxsize=10_000)  # it lives as long as a training, whose policy may write ever new texts
def _class_of(text: str) -> Any:
    number = parse_answer_number(text)
    return text if number is None else number
