"""What a bundle of rewards gives completions that are there already."""

import asyncio
import inspect
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bundle import RewardBundle, reward_name
from .guard import wait_for


@dataclass(frozen=True)
class Scores:
    """The scores of completions.

    Args:
        by_reward (`dict[str, list[float | None]]`):
            For each reward, one score a completion; `None` where it could not be scored.
        total (`list[float | None]`):
            The weighted sum of those that are there, as the trainer makes it; `None` where no reward scored.
    """

    by_reward: dict[str, list[float | None]]
    total: list[float | None]


@dataclass(frozen=True)
class Summary:
    """Scores in a few numbers; `mean`, `spread`, `minimum` and `maximum` are `None` where nothing was scored.

    Args:
        mean, minimum, maximum (`float` or `None`):
            Of the completions that were scored.
        spread (`float` or `None`):
            Their standard deviation.
        full_marks (`float` or `None`):
            Share of all completions with the score of a perfect one; `None` where that is not known.
        not_scored (`float`):
            Share of all completions that could not be scored.
    """

    mean: float | None
    spread: float | None
    minimum: float | None
    maximum: float | None
    full_marks: float | None
    not_scored: float


def score(bundle: Iterable[Any], rows: Sequence[Mapping[str, Any]]) -> Scores:
    """Score completions, each reward as TRL's trainer calls it.

    Args:
        bundle (`RewardBundle` or `list`):
            Reward functions, also asynchronous ones. Reward models need a trainer.
        rows (`Sequence[Mapping]`):
            Each with `completion`, and with `prompt` and whatever columns the rewards look at. Where a prompt is
            messages, its completion becomes a message too.

    Raises:
        ValueError: If a reward is a model, raises, or does not return one number or `None` for each completion.
    """
    bundle = bundle if isinstance(bundle, RewardBundle) else RewardBundle(bundle)
    columns: dict[str, list[Any]] = {
        name: [row.get(name) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row)
        if name not in ("prompt", "completion")
    }
    prompts = [row.get("prompt") for row in rows]
    completions = [_as_prompted(row["completion"], prompt) for row, prompt in zip(rows, prompts, strict=True)]
    by_reward = {
        name: _call(name, reward_func, prompts=prompts, completions=completions, **columns)
        for name, reward_func in zip(bundle.names, bundle, strict=True)
    }
    total = [
        _weighted_sum([scores[index] for scores in by_reward.values()], bundle.weights) for index in range(len(rows))
    ]
    return Scores(by_reward, total)


def summarize(scores: Sequence[float | None], full_marks: float | None = None) -> Summary:
    """What becomes of one reward's scores, or of the total; `full_marks` is the score of a perfect completion."""
    scored = [value for value in scores if value is not None]
    missing = 1 - len(scored) / len(scores)
    perfect = None
    if full_marks is not None:
        perfect = sum(math.isclose(value, full_marks, rel_tol=1e-9) for value in scored) / len(scores)
    if not scored:
        return Summary(None, None, None, None, perfect, missing)
    return Summary(statistics.fmean(scored), statistics.pstdev(scored), min(scored), max(scored), perfect, missing)


def full_marks_of(bundle: RewardBundle) -> dict[str, float | None]:
    """The score of a perfect completion from each reward that knows it."""
    return {
        name: getattr(reward_func, "full_marks", None) for name, reward_func in zip(bundle.names, bundle, strict=True)
    }


def _as_prompted(completion: Any, prompt: Any) -> Any:
    is_conversational = isinstance(prompt, list) and isinstance(completion, str)
    return [{"role": "assistant", "content": completion}] if is_conversational else completion


def _call(name: str, reward_func: Any, **columns: Any) -> list[float | None]:
    if isinstance(reward_func, str) or hasattr(reward_func, "forward"):
        raise ValueError(f"{reward_name(reward_func)} is a reward model, which needs a trainer: leave it out")
    try:
        found = reward_func(
            **columns, trainer_state=None, log_extra=lambda *_, **__: None, log_metric=lambda *_, **__: None
        )
        if inspect.isawaitable(found):
            found = asyncio.run(wait_for(found))
    except Exception as error:  # the reward may be anybody's
        raise ValueError(f"{name} fails on these completions ({type(error).__name__}: {error})") from error
    found = list(found)
    if len(found) != len(columns["completions"]):
        raise ValueError(f"{name} returned {len(found)} scores for {len(columns['completions'])} completions")
    return [_to_score(name, value) for value in found]


def _to_score(name: str, value: Any) -> float | None:
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} returned {value!r}, which is neither a number nor None") from None
    return None if number is None or math.isnan(number) else number


def _weighted_sum(scores: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [weight * value for value, weight in zip(scores, weights, strict=True) if value is not None]
    return sum(known) if known else None
