"""What rules look at: the first and the latest of a run, however long it is. Imports no torch."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .generations import RewardAbout, RewardStatistics
from .record import Generation, Log, Run, Sample, Step


# So many steps and logs are looked through for a metric, and not more: a long run is no dearer than a short one.
LOOK_BACK = 240

Series = list[tuple[int, float]]
Item = TypeVar("Item", Step, Generation, Log)


def thinned(items: list[Item], most: int) -> list[Item]:
    """A run's steps, generations or logs, of many a part: all at which rules look, and some between them.

    Args:
        items (`list`):
            In their order.
        most (`int`):
            Up to so many all are kept; of more at most half as many, so that it is rarely done. At least five times
            `LOOK_BACK`.

    Returns:
        `list`:
            The first and the last `LOOK_BACK`, and those between them that lie evenly far apart, counted in steps.
    """
    if len(items) <= most:
        return items
    first, between, last = items[:LOOK_BACK], items[LOOK_BACK:-LOOK_BACK], items[-LOOK_BACK:]
    distance = (last[0].step - first[-1].step) / (most // 2 - 2 * LOOK_BACK)
    kept, next_step = first, first[-1].step + distance
    for item in between:
        if item.step >= next_step:
            kept.append(item)
            next_step = item.step + distance
    return kept + last


def latest(run: Run, name: str, count: int) -> Series:
    """The last values of a metric with their steps, oldest first; of logs where steps have none. [] if too few."""
    found = _found(reversed(run.steps[-LOOK_BACK:]), "metrics", name, count)
    found = found or _found(reversed(run.logs[-LOOK_BACK:]), "logs", name, count)
    return found[::-1] if len(found) == count else []


def earliest(run: Run, name: str, count: int) -> Series:
    """The first values of a metric, as [`latest`] gives the last."""
    found = _found(run.steps[:LOOK_BACK], "metrics", name, count)
    found = found or _found(run.logs[:LOOK_BACK], "logs", name, count)
    return found if len(found) == count else []


def _found(items: Iterable[Step | Log], field: str, name: str, count: int) -> Series:
    values = ((item.step, values[name]) for item in items if name in (values := getattr(item, field)))
    return list(itertools.islice(values, count))


def mean(series: Series) -> float:
    """The mean of a series' values."""
    return statistics.fmean(value for _, value in series)


def median(series: Series) -> float:
    """Their median."""
    return statistics.median(value for _, value in series)


@dataclass(frozen=True)
class Window:
    """Some generation batches, one behind the other, as one.

    Args:
        generations (`Sequence[Generation]`):
            At least one, the oldest first.
    """

    generations: Sequence[Generation]

    @property
    def step(self) -> int:
        """The first optimizer step that its completions were used for."""
        return self.generations[0].step + 1

    @property
    def completions(self) -> int:
        return self.total("completions")

    @property
    def groups(self) -> int:
        return self.total("groups")

    def total(self, name: str) -> int:
        return sum(getattr(generation.statistics, name) for generation in self.generations)

    def share(self, name: str) -> float:
        """A count of groups as a share of all."""
        return self.total(name) / self.groups

    def mean(self, name: str) -> float | None:
        """Of `right` or `formatted`, over completions."""
        known = [
            (value, generation.statistics.completions)
            for generation in self.generations
            if (value := getattr(generation.statistics, name)) is not None
        ]
        total = sum(count for _, count in known)
        return sum(value * count for value, count in known) / total if total else None

    def of(self, reward: RewardAbout) -> list[RewardStatistics]:
        """A reward function's scores, a generation batch after the other."""
        found = [generation.statistics.rewards.get(reward.name) for generation in self.generations]
        return [statistics_ for statistics_ in found if statistics_ is not None]

    @property
    def samples(self) -> list[Sample]:
        """Completions that were kept, the latest first."""
        return [sample for generation in reversed(self.generations) for sample in generation.samples]


def last_window(run: Run, *, completions: int = 1, groups: int = 1, generations: int = 1) -> Window | None:
    """The shortest window up to now with at least so many of each; `None` where the run has not so many."""
    return _window(run.generations, -1, completions, groups, generations)


def first_window(run: Run, *, completions: int = 1, groups: int = 1, generations: int = 1) -> Window | None:
    """The shortest window from the beginning on with at least so many of each."""
    return _window(run.generations, 1, completions, groups, generations)


def _window(
    found: Sequence[Generation], direction: int, completions: int, groups: int, generations: int
) -> Window | None:
    has_completions = has_groups = 0
    for count in range(1, min(len(found), LOOK_BACK) + 1):
        generation = found[count - 1] if direction > 0 else found[-count]
        has_completions += generation.statistics.completions
        has_groups += generation.statistics.groups
        if count >= generations and has_completions >= completions and has_groups >= groups:
            return Window(found[:count] if direction > 0 else found[-count:])
    return None


def both_windows(run: Run, *, steps_between: int = 0, **least: int) -> tuple[Window, Window] | None:
    """The first and the last window, if they do not overlap and lie so many steps apart."""
    windows = apart(run, first_window(run, **least), last_window(run, **least))
    return windows if windows is not None and windows[1].step - windows[0].step >= steps_between else None


def apart(run: Run, first: Window | None, last: Window | None) -> tuple[Window, Window] | None:
    """A first and a last window, if there are both and they do not overlap."""
    if first is None or last is None or len(first.generations) + len(last.generations) > len(run.generations):
        return None
    return first, last


def fall(windows: tuple[Window, Window], name: str, alike: float) -> tuple[float, float, float] | None:
    """A share of completions, `right` or `formatted`, in both windows, and its fall in standard errors.

    Args:
        windows (`tuple[Window, Window]`):
            The earlier and the later one.
        name (`str`):
            Of [`GenerationStatistics`].
        alike (`float`):
            The correlation of completions of one prompt, from 0 to 1: so much less do they say than as many prompts.
    """
    before, now = (window.mean(name) for window in windows)
    if before is None or now is None:
        return None
    counts = [window.completions for window in windows]
    share = (before * counts[0] + now * counts[1]) / sum(counts)
    size = sum(counts) / (windows[0].groups + windows[1].groups)
    variance = max(0.0, share * (1 - share)) * (1 + (size - 1) * alike) * (1 / counts[0] + 1 / counts[1])
    return before, now, (before - now) / math.sqrt(variance) if variance > 0 else 0.0
