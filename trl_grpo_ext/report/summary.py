"""What happened in a run: the sentence that a report begins with, and the figures beside it. Imports no torch.

**Which figure.** Held-out accuracy, of the first set of problems, before training and at the latest evaluation:
under `strict`, which wants the answer in its tags, as training with this package's format rewards does; under `answer`
where hardly any is ever right under `strict` (at its best not a tenth of what `answer` comes to), because the run asks
for another format. With `load_best_model_at_end` the latest is of the best checkpoint, and that is said; curves show
what was measured in training. Without two evaluations it is
the share of right training completions, or else the training reward, of the first and the last fifth of generations.

**Whether it changed.** Held-out: if the 95 % interval of the paired difference leaves out 0 (and for verdicts,
McNemar's test agrees), see [`trl_grpo_ext.evaluation.comparison`]; where the answers are not at hand, if the two
figures' intervals do not overlap; and never of fewer than six problems, too few for any such test. In training: if the
means of the two fifths differ by Welch's test at 5 %. Everything else "did not change measurably".

**Format or method.** Only for a change under `strict`. What accuracy rose by under `answer`, for which tags do not
matter, was method: more problems are solved. The rest of the rise under `strict` was format: answers that were found
before, and are now in their tags. From two thirds up "most of it was" the one, below a third the other, and between
"about half". If the rise under `answer` cannot be told from 0, it was format as far as can be told. Of a fall it is
said that format was lost, where there is none under `answer`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from ..evaluation.comparison import Difference
from ..evaluation.figures import Estimate
from ..evaluation.history import AFTER, EvaluationRecord
from .record import Run


MOST = 2 / 3
MIN_ITEMS = 6  # with fewer, even if all of them turn right, McNemar's test finds nothing


@dataclass(frozen=True)
class Fact:
    """A key figure: `label`, `value` and, in small print, a `note`."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """What a report begins with.

    Args:
        sentence (`str`):
            What happened.
        facts (`tuple[Fact, ...]`):
            Key figures.
        missing (`tuple[str, ...]`):
            What the record does not have, a sentence each.
        further (`tuple[str, ...]`):
            What happened on further sets of held-out problems, a sentence each.
    """

    sentence: str
    facts: tuple[Fact, ...]
    missing: tuple[str, ...] = ()
    further: tuple[str, ...] = ()


def summarize(run: Run, differences: Mapping[str, Difference] | None = None) -> Summary:
    """Say what happened in a run, see the module for the rules.

    Args:
        run ([`~trl_grpo_ext.report.record.Run`]):
            The run.
        differences (`Mapping[str, Difference]`, *optional*):
            Paired differences between its first and its latest evaluation, by convention.
    """
    ends = ends_of(run)
    if ends is not None and ends[0].step < ends[1].step:
        sentence = _of_evaluations(run, *ends, differences or {})
    else:
        sentence = _of_training(run)
    return Summary(sentence, tuple(_facts(run, ends)), tuple(_missing(run)), tuple(_further(run)))


def ends_of(run: Run) -> tuple[EvaluationRecord, EvaluationRecord] | None:
    """The first and the latest evaluation of the first set of problems; the same one if there is one alone."""
    found = evaluations_of(run)
    return (found[0], found[-1]) if found else None


def evaluations_of(run: Run, name: str | None = None) -> list[EvaluationRecord]:
    """The evaluations of a set of problems, the first set by default, one a step, by step; that of the best checkpoint
    comes last, beside the last step's own."""
    if name is None:
        name = next((record.set for record in run.evaluations), None)
    found = {(r.step, is_of_best(run, r)): r for r in run.evaluations if r.set == name}
    return [found[key] for key in sorted(found)]


def is_of_best(run: Run, record: EvaluationRecord) -> bool:
    """Whether an evaluation after training was of the best checkpoint's weights, and not of those of the last step."""
    if record.evaluation != AFTER or run.settings.get("load_best_model_at_end") is not True:
        return False
    in_training = [other for other in run.evaluations if other.set == record.set and other.evaluation != AFTER]
    return bool(in_training) and (in_training[-1].step, in_training[-1].figures) != (record.step, record.figures)


def convention_of(records: Sequence[EvaluationRecord]) -> str:
    """The convention that a run is judged by, see the module."""
    strict, answer = (
        max((r.figures.estimates[name].mean for r in records if name in r.figures.estimates), default=0.0)
        for name in ("strict", "answer")
    )
    return "strict" if strict > 0 and strict >= answer / 10 else "answer"


def is_changed(
    first: EvaluationRecord, last: EvaluationRecord, name: str, difference: Difference | None = None
) -> bool:
    """Whether a figure of both changed measurably, see the module."""
    if min(first.figures.items, last.figures.items) < MIN_ITEMS:
        return False
    if difference is not None:
        return difference.better is not None
    before, after = first.figures.estimates[name], last.figures.estimates[name]
    return before.high < after.low or after.high < before.low


def percent(share: float) -> str:
    """A share as text, in percent."""
    return f"{100 * share:.1f} %"


def interval(estimate: Estimate, scale: float = 100) -> str:
    """The bounds of an estimate's interval as text."""
    return f"{scale * estimate.low:.1f} to {scale * estimate.high:.1f}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{int(minutes // 60)} h {minutes % 60:.0f} min"


def steps_of(run: Run) -> str:
    """How far it has come: `"in 120 steps"`, `"in the 37 of 120 steps that are recorded"`."""
    done, planned = run.last_step, run.settings.get("max_steps")
    has_plan = isinstance(planned, int) and planned > done
    if run.end is not None and run.end.get("status") == "finished":
        return f"in {_count(done, 'step')}"
    if run.end is not None:
        return f"in {done} of {_count(planned, 'step')}" if has_plan else f"in {_count(done, 'step')}"
    return f"in the first {done} of {_count(planned, 'step')}" if has_plan else f"in {_count(done, 'step')} so far"


def status_of(run: Run) -> str:
    """`"finished"`, `"stopped early"`, or that nobody wrote how it ended."""
    if run.end is None:
        return "going on, or killed"
    return "finished" if run.end.get("status") == "finished" else "stopped early"


def _count(number: int | None, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _of_evaluations(
    run: Run, first: EvaluationRecord, last: EvaluationRecord, differences: Mapping[str, Difference]
) -> str:
    convention = convention_of(evaluations_of(run))
    before, after = (record.figures.estimates.get(convention) for record in (first, last))
    if before is None or after is None:
        return _of_training(run)
    name = "Held-out accuracy" if convention == "strict" else "Held-out accuracy, whatever the format,"
    span = steps_of(run) if last.step >= run.last_step else f"up to step {last.step}"
    if first.step > 0:
        span = f"from step {first.step} to step {last.step}"
    difference = differences.get(convention)
    if not is_changed(first, last, convention, difference):
        known = f"95 % interval {interval(after)}" if difference is None else _points(difference)
        if difference is not None and not difference.low <= 0 <= difference.high:  # but McNemar's test is not sure
            known = f"{last.figures.items:,} problem{'s' * (last.figures.items != 1)}, too few to tell"
        sentence = (
            f"{name} did not change measurably: {percent(before.mean)} {_at_first(first)} and {percent(after.mean)} "
            f"after ({known}), {span}."
        )
    else:
        verb = "rose" if after.mean > before.mean else "fell"
        sentence = (
            f"{name} {verb} from {percent(before.mean)} to {percent(after.mean)} (95 % interval {interval(after)})"
            f" {span}"
        )
        told = _attribution(first, last, differences) if convention == "strict" else ""
        sentence += f"; {told}." if told else "."
    return f"{sentence}{_end_of(run)}"


def _points(difference: Difference) -> str:
    low, middle, high = (
        f"{100 * value:+.1f}".replace("-", "−") for value in (difference.low, difference.difference, difference.high)
    )
    return f"a difference of {middle} points, 95 % interval {low} to {high}"


def _at_first(record: EvaluationRecord) -> str:
    return "before" if record.step == 0 else f"at step {record.step}"


def _further(run: Run) -> Iterator[str]:
    records = evaluations_of(run)
    if records and is_of_best(run, records[-1]):
        convention = convention_of(records)
        last = next((r for r in records[-2::-1] if convention in r.figures.estimates), None)
        figure = (
            "" if last is None else f" (at step {last.step} it was {percent(last.figures.estimates[convention].mean)})"
        )
        yield (
            f"That is the best checkpoint, which load_best_model_at_end kept{figure}; "
            "if these very problems chose it, its figure is somewhat too good."
        )
    for name in list(dict.fromkeys(record.set for record in run.evaluations))[1:]:
        records = evaluations_of(run, name)
        convention = convention_of(records)
        before, after = (record.figures.estimates.get(convention) for record in (records[0], records[-1]))
        if len(records) < 2 or before is None or after is None:
            continue
        figures = f"{percent(before.mean)} {_at_first(records[0])} and {percent(after.mean)} after"
        if not is_changed(records[0], records[-1], convention):
            yield f"On {name} it did not change measurably: {figures}."
        else:
            yield f"On {name} it {'rose' if after.mean > before.mean else 'fell'}: {figures}."


def _attribution(first: EvaluationRecord, last: EvaluationRecord, differences: Mapping[str, Difference]) -> str | None:
    """How much of a rise was method and how much format, see the module."""
    try:
        strict, answer = (
            (first.figures.estimates[name], last.figures.estimates[name]) for name in ("strict", "answer")
        )
    except KeyError:
        return None
    rise = strict[1].mean - strict[0].mean
    is_known = is_changed(first, last, "answer", differences.get("answer"))
    if rise < 0:
        if is_known and answer[1].mean < answer[0].mean:
            return None
        often = "more often than" if is_known else "as often as"
        return f"format was lost: answers wherever they stand were right {often} before"
    if not is_known:
        return "as far as can be told it was format: answers wherever they stand were right as often as before"
    if answer[1].mean < answer[0].mean:
        return "it was format: answers wherever they stand were right less often than before"
    method = min(1.0, (answer[1].mean - answer[0].mean) / rise)
    if method >= MOST:
        return "most of it was method, not format" if method < 0.95 else "it was method, not format"
    return "most of it was format, not method" if method <= 1 - MOST else "about half of it was method, half format"


def _of_training(run: Run) -> str:
    if not run.steps and not run.generations:
        return f"No step has been recorded yet.{_end_of(run)}"
    rights = [found.statistics.right for found in run.generations if found.statistics.right is not None]
    rewards = [value for _, value in run.series("reward")]
    values, what, show = (rights, "The share of right training completions", percent)
    if len(values) < 2:
        values, what, show = (rewards or _sums(run), "The training reward", "{:.2f}".format)
    tail = "Nothing was held out to measure it on." if not run.evaluations else "Only one evaluation is there yet."
    if len(values) < 2:
        return f"{_count(run.last_step, 'step')} recorded, too few to say more. {tail}{_end_of(run)}"
    (before, after), changed = _fifths(values)
    if not changed:
        return (
            f"{what} did not change measurably: {show(before)} at first and {show(after)} at last, {steps_of(run)}. "
            f"{tail}{_end_of(run)}"
        )
    verb = "rose" if after > before else "fell"
    return f"{what} {verb} from {show(before)} to {show(after)} {steps_of(run)}. {tail}{_end_of(run)}"


def _sums(run: Run) -> list[float]:
    """The weighted sums of the rewards' means, where no metric has them."""
    weights = {reward.name: reward.weight for reward in run.rewards}
    return [
        sum(weights.get(name, 1.0) * (found.mean or 0.0) for name, found in generation.statistics.rewards.items())
        for generation in run.generations
        if generation.statistics.rewards
    ]


def _fifths(values: Sequence[float]) -> tuple[tuple[float, float], bool]:
    """The means of the first and the last fifth, and whether they differ measurably."""
    size = max(1, len(values) // 5)
    first, last = values[:size], values[-size:]
    means = fmean(first), fmean(last)
    if size < 2:  # no spread to tell a change from
        return means, False
    spreads = variance(first), variance(last)
    if not any(spreads):
        return means, means[0] != means[1]
    degrees = (size - 1) * sum(spreads) ** 2 / sum(spread**2 for spread in spreads)  # Welch's
    return means, abs(means[1] - means[0]) > _quantile(degrees) * math.sqrt(sum(spreads) / size)


def _quantile(degrees: float) -> float:
    """97.5 % of Student's t: the normal's, and what few degrees of freedom add to it (within 2 % from two up)."""
    return 1.96 + 2.372 / degrees + 2.823 / degrees**2 + 2.556 / degrees**3 + 1.6 / degrees**4


def _end_of(run: Run) -> str:
    if run.end is None:
        return " The run is still going on, or it was killed."
    return "" if run.end.get("status") == "finished" else " The run was stopped before its end."


def _facts(run: Run, ends: tuple[EvaluationRecord, EvaluationRecord] | None) -> list[Fact]:
    facts = []
    if ends is not None:
        convention = convention_of(evaluations_of(run))
        for name, label in ((convention, "held-out accuracy"), ("format", "answers in tags")):
            before, after = (record.figures.estimates.get(name) for record in ends)
            if before is None or after is None:
                continue
            if ends[0].step < ends[1].step:
                facts.append(Fact(label, percent(after.mean), f"{_at_first(ends[0])} {percent(before.mean)}"))
            else:
                facts.append(Fact(label, percent(after.mean), f"at step {ends[1].step}"))
    rights = [found.statistics.right for found in run.generations if found.statistics.right is not None]
    if rights and ends is None:
        size = max(1, len(rights) // 5)
        facts.append(
            Fact("right in training", percent(fmean(rights[-size:])), f"at first {percent(fmean(rights[:size]))}")
        )
    facts.append(Fact("optimizer steps", f"{run.last_step:,}", status_of(run)))
    if run.generations:
        completions = sum(found.statistics.completions for found in run.generations)
        facts.append(Fact("completions", f"{completions:,}", f"in {_count(len(run.generations), 'generation')}"))
    seconds = sum(sum(step.seconds.values()) for step in run.steps)
    if seconds:
        between = sum(step.seconds.get("between", 0.0) for step in run.steps)
        facts.append(Fact("time", duration(seconds), f"steps: {(seconds - between) / len(run.steps):.2g} s each"))
    return facts


def _missing(run: Run) -> list[str]:
    missing = []
    if not run.evaluations:
        missing.append(
            "No held-out problems were evaluated, so this report cannot say whether the policy solves more than the "
            "problems it trained on; EvaluationCallback, or --eval_dataset_name, measures it."
        )
    if not run.steps:
        missing.append("No optimizer step is recorded yet.")
    if not any(generation.samples for generation in run.generations):
        missing.append("No completions of training are in the record.")
    if run.unreadable_lines:
        missing.append(
            f"{_count(run.unreadable_lines, 'line')} of the record could not be read, as happens where a run is "
            "killed in the middle of one; all others are shown."
        )
    return missing
