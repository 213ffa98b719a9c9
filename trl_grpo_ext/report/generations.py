"""A generation batch in numbers: rewards, groups without signal, what advantages are made of. Imports no torch."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from ..rewards._base import Reward
from ..rewards.bundle import reward_name
from ..rewards.correctness import AnswerReward


# What a reward looks at. Rewards of this package say so themselves, others by their names.
CORRECTNESS, FORMAT, OTHER = "correctness", "format", "other"
_NAMES_OF_CORRECTNESS = re.compile("correct|accura|exact|solve|verif", re.IGNORECASE)
_NAMES_OF_FORMAT = re.compile("format|xml|tag|think|struct|int_reward", re.IGNORECASE)


@dataclass(frozen=True)
class RewardAbout:
    """What is known of a reward function before it has scored anything.

    Args:
        name (`str`):
            As TRL logs it.
        weight (`float`):
            Its weight in the sum.
        kind (`str`):
            `"correctness"`, `"format"` or `"other"`.
        full_marks (`float`, *optional*):
            The score of a perfect completion, where the function says so.
    """

    name: str
    weight: float
    kind: str
    full_marks: float | None = None

    @classmethod
    def of(cls, reward_func: Any, weight: float, name: str | None = None) -> "RewardAbout":
        name = reward_name(reward_func) if name is None else name
        if isinstance(reward_func, AnswerReward):
            kind = CORRECTNESS
        elif isinstance(reward_func, Reward):
            kind = FORMAT
        elif _NAMES_OF_CORRECTNESS.search(name):
            kind = CORRECTNESS
        else:
            kind = FORMAT if _NAMES_OF_FORMAT.search(name) else OTHER
        full_marks = getattr(reward_func, "full_marks", None)
        if not isinstance(full_marks, int | float) or not math.isfinite(full_marks):
            full_marks = None
        return cls(name, float(weight), kind, full_marks)


@dataclass(frozen=True)
class RewardStatistics:
    """A reward function's scores of a generation batch.

    Args:
        mean (`float`, *optional*), std (`float`, *optional*), low (`float`, *optional*), high (`float`, *optional*):
            Of the scores that are finite numbers; `None` without any.
        unscored (`int`):
            Completions without a score (`None` or NaN).
        infinite (`int`):
            Completions whose score is an infinity.
        groups_with_spread (`int`):
            Groups in which the scores differ.
        advantage_share (`float`, *optional*):
            Share of the advantage that is this function's: the covariance of its weighted score with the weighted sum,
            within groups, over the sum's variance, before groups are scaled to the same deviation, if they are. The
            shares of all functions add up to 1; `None` without signal.
    """

    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    unscored: int
    infinite: int
    groups_with_spread: int
    advantage_share: float | None


@dataclass(frozen=True)
class GenerationStatistics:
    """A generation batch of all processes.

    Args:
        completions (`int`):
            How many there are.
        groups (`int`):
            Of how many prompts.
        silent (`int`):
            Groups without signal: the weighted sums of their rewards are all equal.
        silent_right (`int`), silent_wrong (`int`), silent_unscored (`int`):
            Of these, groups whose completions are all right, none right, or not scored at all. The others, silent for
            another reason, are the difference. Without a reward for correctness all but the unscored are "others".
        silent_wrong_without_format (`int`):
            Of the groups that are all wrong, those in which no format reward gives any completion more than its least:
            no tags, mostly.
        right (`float`, *optional*):
            Share of completions, of those that were scored, to which a reward for correctness pays more than 0;
            `None` without such a reward.
        formatted (`float`, *optional*):
            What format rewards pay, as a share of their full marks (of 1 where those are not known), from 0 to 1.
        rewards (`dict[str, RewardStatistics]`):
            By the functions' names.
    """

    completions: int
    groups: int
    silent: int
    silent_right: int
    silent_wrong: int
    silent_unscored: int
    silent_wrong_without_format: int
    right: float | None
    formatted: float | None
    rewards: dict[str, RewardStatistics] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "GenerationStatistics":
        """From what [`to_dict`] gives; raises `TypeError` or `KeyError` for anything else."""
        rewards = {sys.intern(name): checked(RewardStatistics(**found)) for name, found in content["rewards"].items()}
        return checked(cls(**{**content, "rewards": rewards}))


Item = TypeVar("Item")


def checked(item: Item) -> Item:
    """A dataclass's object that was made of what a file says; raises `TypeError` if a field is of another type."""
    for name, hint in _hints_of(type(item)).items():  # type: ignore[arg-type]
        if not _is_of(getattr(item, name), hint):
            raise TypeError(f"{type(item).__name__}.{name} is {type(getattr(item, name)).__name__}, not {hint}")
    return item


@cache
def _hints_of(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, a union of types, or a dictionary with values of a type."""
    parts = get_args(hint)
    if isinstance(hint, UnionType):
        return any(_is_of(value, part) for part in parts)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_is_of(item, parts[1]) for item in value.values())
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def generation_statistics(
    scores: Mapping[str, Sequence[float | None]],
    rewards: Sequence[RewardAbout],
    num_generations: int,
    *,
    normalizes_first: bool = False,
) -> GenerationStatistics:
    """Count a generation batch.

    Args:
        scores (`Mapping[str, Sequence[float | None]]`):
            The scores of each reward function, a completion after the other, those of a group together; `None` or NaN
            where there is none.
        rewards (`Sequence[RewardAbout]`):
            The reward functions.
        num_generations (`int`):
            Completions of a group. Those behind the last whole group are left out.
        normalizes_first (`bool`, *optional*, defaults to `False`):
            Whether the scores of each function are normalized within a group before they are weighted and summed, as
            with TRL's `multi_objective_aggregation="normalize_then_sum"`.

    Returns:
        `GenerationStatistics`

    Example:
    ```python
    >>> rewards = [RewardAbout("correctness_reward_func", 1.0, CORRECTNESS, full_marks=2.0)]
    >>> scores = {"correctness_reward_func": [2.0, 0.0, 2.0, 2.0, 0.0, 0.0]}
    >>> found = generation_statistics(scores, rewards, num_generations=2)
    >>> found.groups, found.silent_right, found.silent_wrong, found.right
    (3, 1, 1, 0.5)
    ```
    """
    names = [reward.name for reward in rewards]
    rows = min((len(scores[name]) for name in names), default=0)
    groups = rows // num_generations
    used = [scores[name][: groups * num_generations] for name in names]
    table = np.array([[math.nan if score is None else score for score in found] for found in used], dtype=float)
    table = table.reshape(len(names), groups, num_generations)
    is_scored = ~np.isnan(table)
    finite = np.where(np.isfinite(table), table, math.nan)
    weights = np.array([reward.weight for reward in rewards]).reshape(-1, 1, 1)
    weighted = np.nan_to_num(_normalized(finite) if normalizes_first else finite) * weights
    sums = weighted.sum(axis=0)  # (groups, num_generations)
    within = sums - sums.mean(axis=1, keepdims=True)
    variance = float((within**2).sum())
    is_silent = np.isclose(sums, sums[:, :1], rtol=1e-6, atol=1e-8).all(axis=1)
    is_unscored = ~is_scored.any(axis=(0, 2))

    is_right, was_graded = _right(finite, rewards)
    has_format = _has_format(finite, rewards)
    all_right = is_silent & ~is_unscored & (is_right.all(axis=1) if was_graded.any() else False)
    all_wrong = is_silent & ~is_unscored & (~is_right.any(axis=1) & was_graded.any(axis=1))
    return GenerationStatistics(
        completions=groups * num_generations,
        groups=groups,
        silent=int(is_silent.sum()),
        silent_right=int(all_right.sum()),
        silent_wrong=int(all_wrong.sum()),
        silent_unscored=int((is_silent & is_unscored).sum()),
        silent_wrong_without_format=int((all_wrong & ~has_format).sum()) if has_format is not None else 0,
        right=float(is_right.sum() / was_graded.sum()) if was_graded.any() else None,
        formatted=_formatted(finite, rewards),
        rewards={
            name: _reward_statistics(table[i], finite[i], weighted[i], within, variance)
            for i, name in enumerate(names)
        },
    )


def _reward_statistics(
    scores: np.ndarray, finite: np.ndarray, weighted: np.ndarray, within: np.ndarray, variance: float
) -> RewardStatistics:
    known = finite[~np.isnan(finite)]
    has_spread = np.nan_to_num(finite, nan=-math.inf)
    return RewardStatistics(
        mean=float(known.mean()) if known.size else None,
        std=float(known.std()) if known.size else None,
        low=float(known.min()) if known.size else None,
        high=float(known.max()) if known.size else None,
        unscored=int(np.isnan(scores).sum()),
        infinite=int(np.isinf(scores).sum()),
        groups_with_spread=int((has_spread != has_spread[:, :1]).any(axis=1).sum()),
        advantage_share=float((weighted * within).sum() / variance) if variance > 1e-12 else None,
    )


def _normalized(finite: np.ndarray) -> np.ndarray:
    """As TRL does it: within a group, over the completions that a function has scored."""
    counts = (~np.isnan(finite)).sum(axis=2, keepdims=True)
    deviations = finite - np.nansum(finite, axis=2, keepdims=True) / np.maximum(counts, 1)
    std = np.sqrt(np.nansum(deviations**2, axis=2, keepdims=True) / np.maximum(counts - 1, 1))
    return deviations / (std + 1e-4)


def _right(finite: np.ndarray, rewards: Sequence[RewardAbout]) -> tuple[np.ndarray, np.ndarray]:
    """Which completions a reward for correctness pays for, and which it has graded, `(groups, num_generations)`."""
    chosen = finite[[i for i, reward in enumerate(rewards) if reward.kind == CORRECTNESS]]
    return (np.nan_to_num(chosen) > 0).any(axis=0), (~np.isnan(chosen)).any(axis=0)


def _has_format(finite: np.ndarray, rewards: Sequence[RewardAbout]) -> np.ndarray | None:
    """In which groups a format reward pays anything, `(groups,)`; `None` without a format reward."""
    chosen = finite[[i for i, reward in enumerate(rewards) if reward.kind == FORMAT]]
    return (np.nan_to_num(chosen) > 0).any(axis=(0, 2)) if len(chosen) else None


def _formatted(finite: np.ndarray, rewards: Sequence[RewardAbout]) -> float | None:
    shares = []
    for i, reward in enumerate(rewards):
        known = finite[i][~np.isnan(finite[i])]
        if reward.kind == FORMAT and known.size:
            shares.append(float(np.clip(known / (reward.full_marks or 1.0), 0, 1).mean()))
    return sum(shares) / len(shares) if shares else None
