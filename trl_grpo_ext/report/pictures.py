"""A run in pictures: small charts as SVG, whose colours are the page's, so that one serves light, dark and print.

[`charts_of`] says what is drawn, without drawing: each [`Chart`] has a title that says what to see, axes with their
units, and curves. [`draw`] draws one with matplotlib. No text of a run is inside the drawings; titles and legends are
the page's. Curves of single steps are noisy: each step stands faintly behind the running mean; of long runs, where
steps are closer than the eye can tell, the range of each stretch does.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import numpy as np

from .record import Run
from .summary import convention_of, duration, evaluations_of, is_changed, is_of_best, percent


# CSS variables by the colours that stand for them while matplotlib draws; of curves there are as many as SERIES.
SERIES = 6
_COLOURS = {f"--c{number + 1}": f"#01010{number + 1}" for number in range(SERIES)} | {
    "--ink": "#020201",
    "--soft": "#020202",
    "--line": "#020203",
    "--grid": "#020204",
    "--paper": "#020205",
}
DASHES = ("", "5 3.5", "1.5 2", "7 2 1.5 2", "9 3", "3 1.5")
# A point of a curve for each of so many stretches is as much as can be seen.
MAX_POINTS = 300
MAX_BARS = 12
WIDTH, HEIGHT = 400, 228  # pixels
WIDE = 832  # of a chart that has a row to itself
STEP = "optimizer step"
PERCENT = "% of {}"


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Args:
        label (`str`):
            What the legend calls it.
        x (`np.ndarray`), y (`np.ndarray`):
            Its points.
        low (`np.ndarray`, *optional*), high (`np.ndarray`, *optional*):
            An interval around each point.
        colour (`int`):
            Which of the page's colours, from 0.
        dash (`int`):
            Which of `DASHES`.
        is_noisy (`bool`):
            Whether the points stand faintly behind their running mean.
        has_points (`bool`):
            Whether the points are marked: measured there alone.
        is_thin (`bool`):
            Whether it is less important than the others.
        has_band (`bool`):
            Whether the intervals of its points are joined.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: int = 0
    dash: int = 0
    is_noisy: bool = True
    has_points: bool = False
    is_thin: bool = False
    has_band: bool = False


@dataclass(frozen=True)
class Chart:
    """What a picture shows.

    Args:
        name (`str`):
            A word for the file and the page.
        title (`str`):
            A sentence: what to see.
        y_label (`str`):
            What is measured, with its unit.
        curves (`list[Curve]`):
            The lines, or the areas from the lowest.
        note (`str`):
            What one has to know to read it.
        x_label (`str`):
            What it is measured over.
        is_stacked (`bool`):
            Whether the curves are areas one on another.
        limits (`tuple[float | None, float | None]`):
            Of the vertical axis, where they are known.
        marks (`list[tuple[float, str]]`):
            Heights of dotted lines, and what they are.
        last_x (`float`):
            How far the horizontal axis goes at least: all charts of a run as far.
        stretches (`int`):
            Areas are means over so many stretches: single steps jump too much to be stacked.
        is_plain (`bool`):
            Whether the title says it all, so that there is nothing to see: a line of text does.
    """

    name: str
    title: str
    y_label: str
    curves: list[Curve]
    note: str = ""
    x_label: str = STEP
    is_stacked: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    marks: list[tuple[float, str]] = field(default_factory=list)
    last_x: float = 0
    stretches: int = 60
    is_plain: bool = False


def charts_of(runs: Sequence[Run], names: Sequence[str] | None = None) -> list[Chart]:
    """What there is to draw of one run, or of several over one another.

    Args:
        runs (`Sequence[Run]`):
            The runs.
        names (`Sequence[str]`, *optional*):
            What legends call them.
    """
    builders: tuple[Callable[[Run], Iterable[Chart]], ...] = (
        _accuracies,
        _format_and_correctness,
        _rewards,
        _groups,
        _lengths,
        _passes,
        _sampler,
        _optimizer,
        _costs,
    )
    last_x = max((run.last_step for run in runs), default=0)
    if len(runs) == 1:
        return [replace(chart, last_x=last_x) for build in builders for chart in build(runs[0])]
    # Each run's charts, put together by their names: a colour for each run, and no dash twice where they suffice
    found: dict[str, list[tuple[int, Chart]]] = {}
    for number, run in enumerate(runs):
        for build in builders:
            for chart in build(run):
                found.setdefault(chart.name, []).append((number, chart))
    names = [run.name for run in runs] if names is None else names
    return [replace(_over_one_another(charts, names), last_x=last_x) for charts in found.values()]


def _over_one_another(charts: list[tuple[int, Chart]], names: Sequence[str]) -> Chart:
    first = charts[0][1]
    curves = []
    for number, chart in charts:
        chosen = [_total(chart)] if chart.is_stacked else [curve for curve in chart.curves if not curve.is_thin]
        if chart.name.startswith("accuracy:"):
            chosen = chosen[:1]
        for dash, curve in enumerate(chosen[:3]):
            label = names[number] if len(chosen) == 1 else f"{names[number]}, {curve.label}"
            curves.append(
                replace(
                    curve,
                    label=label,
                    colour=number % SERIES,
                    dash=dash_of(number) if len(chosen) == 1 else number * len(chosen) + dash,
                    low=curve.low if curve.has_points else None,
                    high=curve.high if curve.has_points else None,
                    has_band=curve.has_band and len(charts) <= 3,  # of more runs they hide each other
                )
            )
    marks = first.marks if all(chart.marks == first.marks for _, chart in charts) else []
    note = first.note.replace("Mean, and one standard deviation of the completions to each side.", "Means.")
    if first.is_stacked:
        note = "The sum of all parts; the parts are in each run's own report."
    title = _TITLES.get(first.name, first.title if len(charts) == 1 else _subject(first))
    is_plain = all(chart.is_plain and chart.title == first.title for _, chart in charts)
    title = f"In all runs: {first.title}" if is_plain else title
    return replace(first, title=title, curves=curves, is_stacked=False, note=note, marks=marks, is_plain=is_plain)


def dash_of(number: int) -> int:
    """Which of `DASHES` a run has, so that it is known without its colour."""
    return (number + number // SERIES) % len(DASHES)


# What a chart of several runs is called: it has no one thing to see.
_TITLES = {
    "format": "Format and correctness in training",
    "groups": "Groups without signal",
    "length": "Length of completions",
    "truncated": "Completions that were cut off",
    "kl": "How far each pass moves the policy",
    "clipped": "Tokens at which the clip binds",
    "passes": "Passes over each batch",
    "reference": "Distance to the reference policy",
    "sampler": "Sampler against trainer",
    "entropy": "Entropy",
    "gradient": "Norm of the gradient",
    "rate": "Learning rate",
    "tokens": "Tokens that the update computes",
    "seconds": "Time of a step",
    "gpu": "Use of the GPU",
}


def _subject(chart: Chart) -> str:
    """What a chart of no fixed name is about."""
    kind, _, name = chart.name.partition(":")
    if kind == "accuracy":
        return f"Held-out accuracy, {name}, under {chart.curves[0].label.partition(',')[0]}"
    return f"Reward: {name}"


def _total(chart: Chart) -> Curve:
    return replace(chart.curves[0], label="all", y=np.sum([curve.y for curve in chart.curves], axis=0), is_noisy=True)


# What is drawn: each of these yields the charts for which the run has the numbers.


def _accuracies(run: Run) -> Iterable[Chart]:
    for number, name in enumerate(dict.fromkeys(record.set for record in run.evaluations)):
        records = [record for record in evaluations_of(run, name) if not is_of_best(run, record)]
        main = convention_of(records)
        records = [record for record in records if main in record.figures.estimates]
        if not records:
            continue
        shown = [main, "answer" if main == "strict" else "strict"]
        shown += [found for found in records[-1].figures.estimates if found.startswith("mean@")][:1]
        curves: list[Curve] = []
        for metric in shown:
            found = [(r.step, r.figures.estimates[metric]) for r in records if metric in r.figures.estimates]
            if found and (metric == main or any(estimate.mean > 0 for _, estimate in found)):
                x, y, low, high = np.array([(s, 100 * e.mean, 100 * e.low, 100 * e.high) for s, e in found]).T
                spot = len(curves)
                if spot and np.array_equal(y, curves[0].y):  # all answers are in tags
                    curves[0] = replace(curves[0], label=f"{curves[0].label}, {metric}")
                    continue
                curves.append(
                    Curve(metric, x, y, low, high, spot, spot, is_noisy=False, has_points=True, has_band=not spot)
                )
        right = _of_generations(run, lambda statistics: _hundred(statistics.right))
        if number == 0 and len(right[0]) > 1:
            curves.append(Curve("right in training", *right, colour=5, dash=5, is_thin=True))
        if curves:
            highest = max(float((curve.y if curve.high is None else curve.high).max()) for curve in curves)
            items = records[-1].figures.items
            yield Chart(
                f"accuracy:{name}",
                _accuracy_title(records, main, name if number else ""),
                PERCENT.format("answers that are right"),
                curves,
                note=f"{items:,} held-out problems, with 95 % intervals. Under strict an answer counts in its tag "
                "alone, under answer wherever it stands.",
                limits=(0, 100 if highest > 25 else None),  # a few percent are seen from near alone
            )


def _accuracy_title(records: list[Any], metric: str, name: str) -> str:
    subject = f"Held-out accuracy ({name})" if name else "Held-out accuracy"
    means = [record.figures.estimates[metric].mean for record in records]
    first, last = records[0], records[-1]
    if len(records) == 1:
        return f"{subject} is {percent(means[0])} at step {first.step}"
    ends = f"{percent(means[0])} at first and {percent(means[-1])} at last"
    way = 1 if means[-1] >= means[0] else -1
    far = max(range(len(means)), key=lambda spot: way * means[spot])
    if is_changed(records[far], last, metric):  # it went further than where it ended
        there = f"{'highest' if way > 0 else 'lowest'} at step {records[far].step}, {percent(means[far])}"
        return f"{subject} was {there}; it was {ends}"
    if not is_changed(first, last, metric):
        return f"{subject} was {ends}: the intervals overlap"
    reached = next(record.step for record in records if not is_changed(record, last, metric))
    until = f", not measurably after step {reached}" if len(records) > 2 and reached < last.step else ""
    return f"{subject} {'rose' if way > 0 else 'fell'} from {percent(means[0])} to {percent(means[-1])}{until}"


def _format_and_correctness(run: Run) -> Iterable[Chart]:
    right = _of_generations(run, lambda statistics: _hundred(statistics.right))
    formatted = _of_generations(run, lambda statistics: _hundred(statistics.formatted))
    curves = []
    if len(right[0]):
        curves.append(Curve("correctness", *right, colour=0))
    if len(formatted[0]):
        curves.append(Curve("format", *formatted, colour=1, dash=1))
    if curves:
        yield Chart(
            "format",
            _format_title(right[1], formatted[1]),
            PERCENT.format("full marks"),
            curves,
            note="Training completions: share that is right, and what the format rewards pay of their full marks.",
            limits=(0, 100),
        )


def _format_title(right: np.ndarray, formatted: np.ndarray) -> str:
    if not len(formatted):
        return f"Correctness in training {_course(right, '{:.0f} %')}"
    if not len(right):
        return f"Format in training {_course(formatted, '{:.0f} %')}"
    ways = {"correctness": _way(right), "format": _way(formatted)}
    if ways["correctness"] == ways["format"] == 1:
        is_first = _half_way(formatted) < _half_way(right) * 0.8
        return f"Format and correctness rose{', format sooner' if is_first else ' together'}"
    rising, falling = ([name for name, way in ways.items() if way == wanted] for wanted in (1, -1))
    steady = [
        f"{name} stayed at about {values.mean():.0f} %"
        for name, values in (("correctness", right), ("format", formatted))
        if ways[name] == 0
    ]
    parts = [f"{name} {verb}" for names, verb in ((rising, "rose"), (falling, "fell")) for name in names] + steady
    title = ", ".join(parts)
    return title[0].upper() + title[1:]


def _way(percents: np.ndarray) -> int:
    """Whether a share rose (1), fell (-1) or did neither: by two points at least, else there is nothing to see."""
    first, last = _ends(percents)
    return int(np.sign(last - first)) if _is_trend(percents) and abs(last - first) >= 2 else 0


def _rewards(run: Run) -> Iterable[Chart]:
    abouts = {reward.name: reward for reward in run.rewards}
    names = dict.fromkeys(name for found in run.generations for name in found.statistics.rewards)
    for name in list(names)[:8]:
        found = [
            (generation.step, reward.mean, reward.std or 0.0, reward.low, reward.high)
            for generation in run.generations
            if (reward := generation.statistics.rewards.get(name)) is not None and reward.mean is not None
        ]
        if not found:
            continue
        x, y, std, low, high = np.array(found, dtype=float).T
        about = abouts.get(name)
        full = about.full_marks if about is not None else None
        curve = Curve("mean", x, y, np.maximum(y - std, low), np.minimum(y + std, high), colour=0)
        weight = f" Its weight is {about.weight:g}." if about is not None else ""
        yield Chart(
            f"reward:{name}",
            f"{name} {_course(y, '{:.2f}', '' if full is None else f'of {full:g}')}",
            "score" if full is None else f"score (full marks {full:g})",
            [curve],
            note=f"Mean, and one standard deviation of the completions to each side.{weight}",
            limits=(min(0.0, float(low.min())), full * 1.05 if full is not None and full > high.max() * 0.5 else None),
            marks=[(full, "full marks")] if full is not None else [],
            is_plain=len(y) > 1 and not std.any() and float(np.ptp(y)) == 0,
        )


def _groups(run: Run) -> Iterable[Chart]:
    found = [
        (g.step, s.silent_right, s.silent_wrong, s.silent_unscored, s.silent, s.groups)
        for g in run.generations
        if (s := g.statistics).groups
    ]
    if not found:
        return
    x, right, wrong, unscored, silent, groups = np.array(found, dtype=float).T
    parts = {
        "all right": (right, 0),
        "all wrong": (wrong, 1),
        "not scored": (unscored, 2),
        "equal for another reason": (silent - right - wrong - unscored, 3),
    }
    curves = [
        Curve(name, x, 100 * values / groups, colour=colour, dash=colour)
        for name, (values, colour) in parts.items()
        if values.any()
    ] or [Curve("all right", x, right)]
    share = 100 * silent.sum() / groups.sum()
    late = max(1, len(x) // 5)
    most = max(parts, key=lambda name: parts[name][0][-late:].sum())
    now = 100 * silent[-late:].sum() / groups[-late:].sum()
    title = f"{share:.0f} % of groups carried no signal" if share >= 0.5 else "Nearly every group carried signal"
    title = title if silent.any() else "Every group carried signal"
    if now >= 10:
        is_most = parts[most][0][-late:].sum() > silent[-late:].sum() / 2
        title = f"{now:.0f} % of groups carry no signal at last{f', most of them {most}' if is_most else ''}"
    yield Chart(
        "groups",
        title,
        PERCENT.format("groups"),
        curves,
        note="Groups whose completions all got the same reward: they have no advantage and teach nothing.",
        is_stacked=True,
        limits=(0, 100),
        stretches=30,
        is_plain=not silent.any(),
    )


def _lengths(run: Run) -> Iterable[Chart]:
    x, y = _series(run, "completions/mean_length")
    longest = _number(run, "max_completion_length")
    if len(x):
        curves = [Curve("mean", x, y)]
        mark = longest if longest is not None and longest < 4 * y.max() else None
        yield Chart(
            "length",
            f"Completions {_course(y, '{:.0f}', 'tokens', stays='were')}",
            "tokens in a completion",
            curves,
            note=f"Mean length. The longest possible is {longest:,.0f} tokens." if longest else "Mean length.",
            limits=(0, mark * 1.05 if mark is not None else None),
            marks=[(mark, "longest possible")] if mark is not None else [],
        )
    x, y = _series(run, "completions/clipped_ratio")
    if len(x):
        y = 100 * y
        title = f"The share that is cut off {_course(y, '{:.0f} %')}"
        if max(y.mean(), *_ends(y)) < 0.5:
            title = "Few completions were cut off" if y.any() else "No completion was cut off"
        yield Chart(
            "truncated",
            title,
            PERCENT.format("completions"),
            [Curve("cut off", x, y)],
            note="Completions that had not ended when they reached the longest length.",
            limits=(0, max(5.0, min(100.0, float(y.max()) * 1.15))),
            is_plain=not y.any(),
        )


def _passes(run: Run) -> Iterable[Chart]:
    planned = run.settings.get("num_iterations")
    kl, clipped = _by_pass(run, "approx_kl", 1), _by_pass(run, "clip_ratio", 100)
    if len(kl) == 1 and not kl[0].y.any():  # a first pass alone begins where the policy generated
        kl = []
    if kl:
        target = _number(run, "target_kl")
        last = kl[-1]
        yield Chart(
            "kl",
            f"Before {last.label} the policy had moved {last.y.mean():.2g} nats a token on average",
            "KL from the old policy, nats a token",
            kl,
            note="How far the policy is from the one that generated, measured at the beginning of each pass."
            + (f" Beyond {target:g} no further pass begins." if target is not None else "")
            + _seldom(kl),
            limits=(0, None),
            marks=[(target, "target_kl")] if target is not None else [],
        )
    if not clipped:
        x, y = _series(run, "clip_ratio/region_mean")
        clipped = [Curve("all passes", x, 100 * y)] if len(x) else []
    if clipped:
        last = clipped[-1]
        title = f"The clip bound for {last.y.mean():.2g} % of tokens in {last.label}, {last.y.max():.2g} % at most"
        yield Chart(
            "clipped",
            title if max(curve.y.max() for curve in clipped) > 0 else "The clip never bound",
            PERCENT.format("tokens"),
            clipped,
            note="Tokens whose ratio to the old policy is beyond epsilon, so that they no longer push."
            + _seldom(clipped),
            limits=(0, None),
            is_plain=not any(curve.y.any() for curve in clipped),
        )
    x, y = _series(run, "rollouts/iterations_used")
    if len(x) and planned != 1:
        mean = float(y.mean())
        all_used = isinstance(planned, int) and bool((y == planned).all())
        of = f" of {planned}" if isinstance(planned, int) else ""
        yield Chart(
            "passes",
            f"All {planned} passes over each batch were used"
            if all_used
            else f"{mean:.1f}{of} passes were used on average",
            "passes over a batch",
            [Curve("used", x, y)],
            note="Passes over each batch of completions; target_kl can end them early.",
            limits=(0, (planned if isinstance(planned, int) else float(y.max())) * 1.15),
            is_plain=all_used,
        )
    x, y = _series(run, "kl")
    if len(x) and y.any():
        yield Chart(
            "reference",
            f"The distance to the reference policy {_course(y, '{:.2g}', 'nats')}",
            "KL to the reference, nats a token",
            [Curve("KL", x, y)],
            note="What beta holds back.",
            limits=(min(0.0, float(y.min())), None),
        )


def _seldom(passes: list[Curve]) -> str:
    """How often the last pass took place, where the first one did more often: its means are of these alone."""
    first, last = passes[0], passes[-1]
    times, count = len(last.x), len(first.x)
    return f" Of {count:,} batches, {times:,} had a {last.label}." if times < count else ""


def _by_pass(run: Run, metric: str, scale: float) -> list[Curve]:
    names = {name for step in run.steps for name in step.metrics if name.endswith(f"/{metric}")}
    passes = sorted(int(found[1]) for name in names if (found := re.fullmatch(rf"iteration/(\d+)/{metric}", name)))
    if len(passes) > 4:  # the first ones, and the last
        passes = [*passes[:3], passes[-1]]
    curves = []
    for spot, number in enumerate(passes):
        x, y = _series(run, f"iteration/{number}/{metric}")
        curves.append(Curve(f"pass {number}", x, scale * y, colour=spot, dash=spot))
    return curves


def _sampler(run: Run) -> Iterable[Chart]:
    x, y = _series(run, "sampling/importance_sampling_ratio/mean")
    if len(x):
        yield Chart(
            "sampler",
            f"Sampler and trainer: the ratio of their probabilities {_course(y, '{:.3f}')}",
            "mean importance weight, 1 is agreement",
            [Curve("mean", x, y)],
            marks=[(1.0, "agreement")],
        )


def _optimizer(run: Run) -> Iterable[Chart]:
    x, y = _series(run, "entropy")
    if len(x):
        yield Chart(
            "entropy",
            f"Entropy {_course(y, '{:.2g}', 'nats')}",
            "entropy, nats a token",
            [Curve("mean", x, y)],
            note="How undecided the policy is about its next token. Near 0 it no longer explores.",
            limits=(0, None),
        )
    x, y = _series(run, "grad_norm")
    if len(x):
        limit = _number(run, "max_grad_norm")
        limit = limit if limit is not None and 0 < limit < 1.5 * y.max() else None
        yield Chart(
            "gradient",
            f"The gradient's norm {_course(y, '{:.2g}')}",
            "norm of the gradient, before clipping",
            [Curve("norm", x, y)],
            note="Above max_grad_norm gradients are scaled down." if limit is not None else "",
            limits=(0, None),
            marks=[(limit, "max_grad_norm")] if limit is not None else [],
        )
    x, y = _series(run, "learning_rate")
    if len(x):
        first, most, last = (_tick(float(value)) for value in (y[0], y.max(), y[-1]))
        if y.max() > max(y[0], y[-1]):
            title = f"The learning rate rose from {first} to {most} and is {last} at last"
        elif y[0] == y[-1]:
            title = f"The learning rate is {first} at both ends"
        else:
            title = f"The learning rate {'fell' if y[-1] < y[0] else 'rose'} from {first} to {last}"
        is_plain = float(np.ptp(y)) == 0
        yield Chart(
            "rate",
            f"The learning rate stayed at {first}" if is_plain else title,
            "learning rate",
            [Curve("rate", x, y, is_noisy=False)],
            limits=(0, None),
            is_plain=is_plain,
        )


def _costs(run: Run) -> Iterable[Chart]:
    (x, tokens), (_, padded) = _series(run, "update/tokens"), _series(run, "update/tokens_padded")
    if len(x) and len(x) == len(padded) and padded.sum() > 0:
        share = 100 * tokens.sum() / padded.sum()
        yield Chart(
            "tokens",
            f"The update computed {share:.0f} % of the tokens that padded rows have",
            "thousands of tokens in a step",
            [
                Curve("computed", x, tokens / 1e3, colour=0),
                Curve("in padded rows", x, padded / 1e3, colour=1, dash=1),
            ],
            note="Shared prompts are computed once, and padding and rows without advantage not at all.",
            limits=(0, None),
        )
    yield from _seconds(run)
    x, y = _series(run, "gpu/utilization")
    if len(x):
        yield Chart(
            "gpu",
            f"The GPU was busy {100 * y.mean():.0f} % of the time",
            PERCENT.format("time"),
            [Curve("busy", x, 100 * y)],
            limits=(0, 100),
        )


PHASES = ("generation", "rewards", "update")


def _seconds(run: Run) -> Iterable[Chart]:
    steps = [step for step in run.steps if step.seconds]
    names = [name for name in PHASES if any(step.seconds.get(name) for step in steps)]
    if not names:
        return
    x = np.array([step.step for step in steps], dtype=float)
    parts = {name: np.array([step.seconds.get(name, 0.0) for step in steps]) for name in names}
    total = sum(values.sum() for values in parts.values())
    between = sum(step.seconds.get("between", 0.0) for step in steps)
    most = max(parts, key=lambda name: parts[name].sum())
    shares = ", ".join(f"{name} {100 * values.sum() / total:.0f} %" for name, values in parts.items())
    subject = {"generation": "Generation", "rewards": "Scoring", "update": "The update"}[most]
    yield Chart(
        "seconds",
        f"{subject} took {100 * parts[most].sum() / total:.0f} % of the steps' time",
        "seconds in a step",
        [Curve(name, x, values, colour=spot, dash=spot) for spot, (name, values) in enumerate(parts.items())],
        stretches=max(1, min(60, len(run.generations) or 60)),  # a pass alone has no generation
        note=f"In all: {shares}. Evaluations, saving and logging between steps took another {duration(between)}.",
        is_stacked=True,
        limits=(0, None),
    )


# From numbers to words.


def _number(run: Run, setting: str) -> float | None:
    value = run.settings.get(setting)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = np.array(run.series(name), dtype=float).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _of_generations(run: Run, value_of: Callable[[Any], float | None]) -> tuple[np.ndarray, np.ndarray]:
    found = [(g.step, value) for g in run.generations if (value := value_of(g.statistics)) is not None]
    table = np.array(found, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _ends(values: np.ndarray) -> tuple[float, float]:
    """The means of the first and the last tenth."""
    size = max(1, len(values) // 10)
    return (float(values[:size].mean()), float(values[-size:].mean())) if len(values) else (0.0, 0.0)


def _is_trend(values: np.ndarray) -> bool:
    """Whether the ends differ by more than noise: by two standard errors of tenths, see [`_ends`]."""
    if len(values) < 4:
        return False
    first, last = _ends(values)
    values = values[np.concatenate([[True], np.diff(values) != 0])]  # passes over a batch repeat its numbers
    size = max(1, len(values) // 10)
    noise = float(np.std(np.diff(values))) / math.sqrt(2) if len(values) > 1 else 0.0  # the trend left out
    return abs(last - first) > max(2 * noise * math.sqrt(2 / size), 1e-9 * abs(first))


def _half_way(values: np.ndarray) -> int:
    """Where the running mean has gone half of its way."""
    smooth = running_mean(values, len(values) // 20 | 1)
    first, last = smooth[0], smooth[-1]
    return int(np.argmax((smooth - first) * np.sign(last - first) >= abs(last - first) / 2))


def _course(values: np.ndarray, form: str, unit: str = "", stays: str = "stayed at about") -> str:
    unit = f" {unit}" if unit else ""
    first, last = (form.format(value) for value in _ends(values))
    if len(values) == 1:
        return f"is {first}{unit}"
    if float(np.ptp(values)) == 0:
        return f"{'were all' if stays == 'were' else 'stayed at'} {first if values.any() else 0}{unit}"
    if not _is_trend(values) or first == last:
        middle = form.format(float(values.mean()))
        return f"{'were about' if stays == 'were' else stays} {middle}{unit}"
    grows = float(_ends(values)[1]) > float(_ends(values)[0])
    verb = ("grew" if grows else "shrank") if stays == "were" else ("rose" if grows else "fell")
    return f"{verb} from {first} to {last}{unit}"


def span_of(last_step: float) -> float:
    """Over how many steps running means go: a twentieth of the run."""
    return last_step / 20


def window_of(x: np.ndarray, span: float) -> int:
    """How many points a running mean is over, an odd number."""
    if len(x) < 2:
        return 1
    return max(1, round(span * (len(x) - 1) / max(x[-1] - x[0], 1e-9))) // 2 * 2 + 1


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a window around each point, smaller at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(index, len(values) - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _stretches(values: np.ndarray, count: int) -> list[np.ndarray]:
    return np.array_split(values, min(count, len(values)))


# From a chart to SVG.


def draw(chart: Chart, width: int = WIDTH) -> str:
    """A chart as an `<svg>` element, whose colours are CSS variables of the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.name,
        "font.size": 11,
        "font.family": ["DejaVu Sans"],  # what it measures with; the page's own is put in its place
        "axes.unicode_minus": True,
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, HEIGHT / 72), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((44 / width, 40 / HEIGHT, (width - 56) / width, (HEIGHT - 68) / HEIGHT))
        if chart.is_stacked:
            _draw_areas(axes, chart)
        else:
            for curve in chart.curves:
                _draw_curve(axes, curve, span_of(max(chart.last_x, curve.x[-1])))
        _dress(axes, chart, width)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format")))
    return _to_page(buffer.getvalue(), chart, width)


def _draw_curve(axes: Any, curve: Curve, span: float) -> None:
    colour, dashes = _COLOURS[f"--c{curve.colour + 1}"], _dashes(curve.dash)
    x, y = curve.x, curve.y
    if curve.has_points:
        if curve.low is not None and curve.high is not None:
            if curve.has_band or len(x) > MAX_BARS:  # of further curves the bars alone: bands would hide each other
                axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            if len(x) <= MAX_BARS:  # measured at a few steps: where, and how exactly
                bars = np.vstack([y - curve.low, curve.high - y]).clip(0)
                axes.errorbar(x, y, bars, color=colour, linewidth=0, elinewidth=1.2, capsize=3.5, clip_on=False)
        axes.plot(x, y, color=colour, linewidth=1.6, dashes=dashes, clip_on=False)
        axes.plot(x, y, color=colour, linewidth=0, marker="o", markersize=2.5, clip_on=False)
        return
    window = window_of(x, span) if curve.is_noisy else 1
    smooth = running_mean(y, window)
    width = 1.1 if curve.is_thin else 1.8
    if curve.low is not None and curve.high is not None:
        low, high = running_mean(curve.low, window), running_mean(curve.high, window)
        axes.fill_between(*_thinned(x, low, high), color=colour, alpha=0.14, linewidth=0)
    if curve.is_noisy and len(y) > MAX_POINTS:
        middle, parts = _means(x), _stretches(y, MAX_POINTS)
        lows, highs = [part.min() for part in parts], [part.max() for part in parts]
        axes.fill_between(middle, lows, highs, color=colour, alpha=0.2, linewidth=0)
    elif curve.is_noisy and window > 1:
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35 if not curve.is_thin else 0.2)
    marker = "o" if len(y) == 1 else ""
    axes.plot(*_thinned(x, smooth), color=colour, linewidth=width, dashes=dashes, marker=marker, clip_on=False)


def _draw_areas(axes: Any, chart: Chart) -> None:
    count = chart.stretches
    x = np.array([part.mean() for part in _stretches(chart.curves[0].x, count)])
    below = np.zeros_like(x)
    for curve in chart.curves:
        above = below + np.array([part.mean() for part in _stretches(curve.y, count)])
        colour = _COLOURS[f"--c{curve.colour + 1}"]
        if len(x) == 1:
            axes.bar(x, above - below, bottom=below, color=colour, alpha=0.7, width=0.5)
        else:
            axes.fill_between(x, below, above, color=colour, alpha=0.75, linewidth=0)
            axes.plot(x, above, color=_COLOURS["--paper"], linewidth=1)
        below = above


def _tick(value: float) -> str:
    """A small number as people write learning rates, such as `"2e-4"`."""
    if not 0 < abs(value) < 0.01:
        return f"{value:.3g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _means(x: np.ndarray) -> np.ndarray:
    return np.array([part.mean() for part in _stretches(x, MAX_POINTS)])


def _thinned(*series: np.ndarray) -> list[np.ndarray]:
    return [_means(values) for values in series] if len(series[0]) > MAX_POINTS else list(series)


def _dashes(number: int) -> tuple[Any, ...]:
    found = DASHES[number % len(DASHES)]
    return tuple(float(part) / 1.8 for part in found.split()) if found else (None, None)


def _dress(axes: Any, chart: Chart, width: int) -> None:
    from matplotlib.ticker import MaxNLocator

    soft, line, grid = _COLOURS["--soft"], _COLOURS["--line"], _COLOURS["--grid"]
    low, high = chart.limits
    axes.set_ylim(low, high)
    if high is None and low is not None:  # room above the highest point
        top = max([axes.dataLim.y1, *(height for height, _ in chart.marks)])
        axes.set_ylim(low, top + 0.08 * (top - low) if top > low else low + 1)
    for height, _ in chart.marks:
        axes.axhline(height, color=soft, linewidth=1, linestyle=(0, (1, 2)))
    last = max(chart.last_x, *(float(curve.x[-1]) for curve in chart.curves))
    first = min(float(curve.x[0]) for curve in chart.curves)
    axes.set_xlim(min(first, 0 if first <= 2 else first), last if last > first else first + 1)
    axes.margins(x=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(line)
    axes.grid(axis="y", color=grid, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, pad=6, colors=soft)
    axes.tick_params(axis="x", length=3, color=line)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    is_small = axes.get_ylim()[1] < 2e-3
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value) if is_small else f"{value:,.6g}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 3, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(chart.x_label, color=soft, loc="right", labelpad=4, parse_math=False)
    # Above the axis, where it can be read without turning one's head
    axes.text(0, 1, chart.y_label, transform=axes.transAxes, color=soft, va="bottom", parse_math=False).set_position(
        (-44 / (width - 56), 1.045)
    )


_OPENING = re.compile(r"^.*?<svg [^>]*>", re.DOTALL)
# What would be the whole page's (a style for all elements, names that each drawing has) or is not needed
_SURPLUS = re.compile(
    r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    r'|(?<=<g) id="[^"]*"|(?<=<path) id="[a-z]\w*_\d+"| transform="rotate\(-0 [^"]*"|font-family: [^;]*; ',
    re.DOTALL,
)
_LONG_NUMBER = re.compile(r"(\d+\.\d\d)\d+(?!\d*<)")  # a coordinate, and not a label of an axis
_SPACE = re.compile(r"\s+")


def _to_page(svg: str, chart: Chart, width: int) -> str:
    opening = (
        f'<svg class="plot" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(f"{chart.y_label} over {chart.x_label}", quote=True)}" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = _SURPLUS.sub("", _OPENING.sub(lambda _: opening, svg, count=1))
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return _SPACE.sub(" ", _LONG_NUMBER.sub(r"\1", svg)).replace("> <", "><").strip()
