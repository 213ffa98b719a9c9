"""What is wrong with a run: rules over its record, each with a name, evidence, a threshold and a remedy.

[`diagnose`] asks all [`RULES`] about a run, finished or not. A rule is a small pure function that looks at the latest
generations or steps, and at the first ones where it compares, and says nothing until there are enough of them: shares
are of many completions, and a single odd value is none. A rule looks at no more than a window, so a long run is no
dearer than a short one. Imports no torch.

What would follow from another finding is left out: where all completions are cut off, it is no news that none of them
is right.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .generations import CORRECTNESS, FORMAT, RewardAbout
from .record import Run
from .windows import Window, both_windows, earliest, last_window, latest, mean, median


PROBLEM, HINT = "problem", "hint"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Args:
        rule (`str`):
            The rule's name, such as `"truncated-completions"`.
        severity (`str`):
            `"problem"`, or `"hint"` where a run may be well all the same.
        title (`str`):
            What is wrong, a short sentence.
        evidence (`str`):
            A sentence with the numbers.
        threshold (`str`):
            When the rule fires.
        remedy (`str`):
            What to do.
        step (`int`):
            Since which step it holds, as far as the rule has looked back.
    """

    rule: str
    severity: str
    title: str
    evidence: str
    threshold: str
    remedy: str
    step: int

    @property
    def message(self) -> str:
        """All of it in one line."""
        return f"{self.title}. {self.evidence} {self.remedy} [{self.rule}]"


@dataclass(frozen=True)
class Found:
    """What a rule's function says when it fires; what is `None` is as the rule has it."""

    evidence: str
    step: int
    title: str | None = None
    remedy: str | None = None
    severity: str | None = None


@dataclass(frozen=True)
class Rule:
    """A rule: a function over a run, and what there is to say when it fires.

    Args:
        name (`str`):
            Under which it is reported.
        title (`str`), threshold (`str`), remedy (`str`), severity (`str`):
            As in [`Finding`].
        find (`Callable[[Run], Found | None]`):
            Whether it fires.
        explained_by (`tuple[str, ...]`, *optional*):
            Rules of which this one would only be a consequence: if one of them fires, it is left out.
    """

    name: str
    title: str
    threshold: str
    remedy: str
    severity: str
    find: Callable[[Run], Found | None]
    explained_by: tuple[str, ...] = ()

    def look(self, run: Run) -> Finding | None:
        found = self.find(run)
        if found is None:
            return None
        return Finding(
            rule=self.name,
            severity=found.severity or self.severity,
            title=found.title or self.title,
            evidence=found.evidence,
            threshold=self.threshold,
            remedy=found.remedy or self.remedy,
            step=found.step,
        )


# Truncation. TRL's default length is 256 tokens: a model that thinks has every completion cut off before its answer,
# rewards of 0, and learns nothing (TRL issue 5697).
TRUNCATED_SHARE = 0.5
TRUNCATED_COMPLETIONS = 32
TRUNCATED_GENERATIONS = 2


def _truncated(run: Run) -> Found | None:
    window = last_window(run, completions=TRUNCATED_COMPLETIONS, generations=TRUNCATED_GENERATIONS)
    values = latest(run, "completions/clipped_ratio", len(window.generations)) if window else []
    if window is None or not values or mean(values) < TRUNCATED_SHARE:
        return None
    masked = bool(run.settings.get("mask_truncated_completions"))
    consequence = "they carry no gradient" if masked else "they are scored without their ends, so mostly as wrong"
    return Found(
        f"{mean(values):.0%} of the last {window.completions} completions were cut off at max_completion_length="
        f"{_setting(run, 'max_completion_length')}; with mask_truncated_completions={masked} {consequence}.",
        values[0][0],
    )


# References that cannot be scored.
UNSCORED_SHARE = 0.1
UNSCORED_COMPLETIONS = 64
UNSCORED_GENERATIONS = 2


def _unscored(run: Run) -> Found | None:
    window = last_window(run, completions=UNSCORED_COMPLETIONS, generations=UNSCORED_GENERATIONS)
    rewards = _rewards(run, CORRECTNESS)
    if window is None or not rewards:
        return None
    # Rewards may each be for some of the rows, so what one has not scored, another may have.
    unscored = sum(found.unscored for reward in rewards for found in window.of(reward))
    share = unscored / window.completions - (len(rewards) - 1)
    if share < UNSCORED_SHARE:
        return None
    names = [reward.name for reward in rewards]
    sample = next((s for s in window.samples if all(s.rewards.get(name) is None for name in names)), None)
    example = (
        "" if sample is None or sample.reference is None else f", as with the reference {_quoted(sample.reference)}"
    )
    return Found(
        f"{' and '.join(names)} gave no score to {share:.0%} of the last {window.completions} completions{example}.",
        window.step,
    )


# No completion is ever right.
NEVER_COMPLETIONS = 192
NEVER_GENERATIONS = 3
NO_FORMAT = 0.02  # of full marks


def _no_format(run: Run) -> Found | None:
    window = _never_right_window(run)
    formatted = window.mean("formatted") if window else None
    if window is None or formatted is None or formatted >= NO_FORMAT:
        return None
    wrote = next((f", such as {_quoted(sample.completion)}" for sample in window.samples), "")
    return Found(
        f"None of the last {window.completions} completions was right, and rewards for the format paid them "
        f"{formatted:.1%} of full marks{wrote}.",
        window.step,
    )


def _never_right(run: Run) -> Found | None:
    window = _never_right_window(run)
    formatted = window.mean("formatted") if window else None
    if window is None or (formatted is not None and formatted < NO_FORMAT):
        return None
    answered = [sample for sample in window.samples if sample.extracted and sample.reference is not None]
    example = ""
    if answered:
        answer, reference = _quoted(answered[0].extracted or ""), _quoted(answered[0].reference or "")
        example = f"; the answer {answer} was compared with the reference {reference}"
    has_format = "" if formatted is None else f" although the format is there ({formatted:.0%} of full marks)"
    return Found(f"None of the last {window.completions} completions was right{has_format}{example}.", window.step)


def _never_right_window(run: Run) -> Window | None:
    window = last_window(run, completions=NEVER_COMPLETIONS, generations=NEVER_GENERATIONS)
    right = window.mean("right") if window else None
    return window if right == 0 else None


# Groups whose rewards are all equal have no advantage.
SILENT_SHARE = 2 / 3
SILENT_GROUPS = 32
SILENT_GENERATIONS = 3
EASY_GROUPS = 64
# Groups that are all right are a problem from the start, and later what has been achieved.
LEARNED_RIGHT = 0.1


def _silent_groups(kind: str, groups: int = SILENT_GROUPS) -> Callable[[Run], Found | None]:
    """Most groups are silent, and most of these for this reason."""

    def find(run: Run) -> Found | None:
        window = last_window(run, groups=groups, generations=SILENT_GENERATIONS)
        if window is None or window.share("silent") < SILENT_SHARE:
            return None
        counts = _silent_counts(window)
        # the first one in this order of those that are as many
        if max(counts, key=lambda name: counts[name]) != kind:
            return None
        return Found(
            f"In {window.total('silent')} of the last {window.groups} groups all rewards are equal; in {counts[kind]} "
            f"of them {_SILENT_REASONS[kind]}.",
            window.step,
        )

    return find


_SILENT_REASONS = {
    "unscored": "no completion has a score",
    "without format": "no completion is right and none has any of the format",
    "wrong": "no completion is right",
    "right": "all completions are right",
    "others": "they are equal for another reason, such as completions that are all the same",
}


def _silent_counts(window: Window) -> dict[str, int]:
    without_format = window.total("silent_wrong_without_format")
    counts = {
        "unscored": window.total("silent_unscored"),
        "without format": without_format,
        "wrong": window.total("silent_wrong") - without_format,
        "right": window.total("silent_right"),
    }
    return {**counts, "others": window.total("silent") - sum(counts.values())}


def _all_right(run: Run) -> Found | None:
    found = _silent_groups("right")(run)
    return found if found is not None and not _has_learned(run) else None


def _too_easy(run: Run) -> Found | None:
    found = _silent_groups("right", EASY_GROUPS)(run)
    return found if found is not None and _has_learned(run) else None


def _has_learned(run: Run) -> bool:
    windows = both_windows(run, groups=SILENT_GROUPS, generations=SILENT_GENERATIONS)
    if windows is None:
        return False
    before, now = (window.mean("right") for window in windows)
    return before is not None and now is not None and now - before >= LEARNED_RIGHT


# Rewards that are no rewards.
INFINITE_GENERATIONS = 4
DEAD_COMPLETIONS = 256
DEAD_GENERATIONS = 4


def _not_finite(run: Run) -> Found | None:
    generations = run.generations[-INFINITE_GENERATIONS:]
    for reward in run.rewards if generations else []:
        window = Window(generations)
        count = sum(found.infinite for found in window.of(reward))
        if count:
            return Found(
                f"{reward.name} gave an infinity to {count} of the last {window.completions} completions.",
                window.step,
                severity=_severity_of(reward),
            )
    return None


def _without_scores(run: Run) -> Found | None:
    window = last_window(run, completions=DEAD_COMPLETIONS, generations=DEAD_GENERATIONS)
    if window is None:
        return None
    for reward in run.rewards:
        found = window.of(reward)
        if reward.kind != CORRECTNESS and found and sum(f.unscored for f in found) == window.completions:
            return Found(
                f"{reward.name} returned None or NaN for each of the last {window.completions} completions.",
                window.step,
                severity=_severity_of(reward),
            )
    return None


def _constant(run: Run) -> Found | None:
    """A reward that has never said anything: it is constant now, and was the same at the beginning."""
    last = last_window(run, completions=DEAD_COMPLETIONS, generations=DEAD_GENERATIONS)
    if last is None:
        return None
    for reward in run.rewards:
        value = _only_value(last, reward)
        if value is None or value != _only_value(Window(run.generations[: len(last.generations)]), reward):
            continue
        if (reward.kind == CORRECTNESS and value <= 0) or value == reward.full_marks:
            continue  # never right has a rule of its own, and full marks are what is wanted
        # Format that nobody writes yet can come with the format that others pay for.
        is_to_come = reward.kind == FORMAT and value <= 0
        return Found(
            f"{reward.name} gave {value:g} to each of the last {last.completions} completions, and nothing else since "
            "the beginning.",
            run.generations[0].step + 1,
            severity=HINT if is_to_come else _severity_of(reward),
        )
    return None


def _only_value(window: Window, reward: RewardAbout) -> float | None:
    found = window.of(reward)
    values = {value for statistics in found for value in (statistics.low, statistics.high) if value is not None}
    return values.pop() if len(values) == 1 else None


# Other rewards make the advantage, and there would be something to learn from correctness.
DOMINANT_SHARE = 0.8
DOMINANT_GROUPS = 32
DOMINANT_GENERATIONS = 4
DOMINANT_SPREAD = 0.2  # share of groups in which correctness differs
DOMINANT_RIGHT = 0.9


def _dominant(run: Run) -> Found | None:
    window = last_window(run, groups=DOMINANT_GROUPS, generations=DOMINANT_GENERATIONS)
    right = window.mean("right") if window else None
    judges = [reward for reward in _rewards(run, CORRECTNESS) if reward.weight > 0]
    if window is None or not judges or right is None or right >= DOMINANT_RIGHT:
        return None
    spread = max(sum(f.groups_with_spread for f in window.of(reward)) for reward in judges) / window.groups
    if spread < DOMINANT_SPREAD:
        return None
    shares = {}
    for reward in run.rewards:
        known = [f.advantage_share for f in window.of(reward) if f.advantage_share is not None]
        if reward.kind != CORRECTNESS and known:
            shares[reward.name] = sum(known) / len(known)
    if sum(shares.values()) <= DOMINANT_SHARE:
        return None
    name = max(shares, key=lambda name: shares[name])
    return Found(
        f"Over the last {window.groups} groups rewards for other things make {sum(shares.values()):.0%} of the "
        f"advantage, {name} alone {shares[name]:.0%}, while {right:.0%} of completions are right and correctness "
        f"differs within {spread:.0%} of groups.",
        window.step,
    )


# Something else rises, and correctness does not.
FLAT_STEPS = 40
FLAT_GROUPS = 64
FLAT_GENERATIONS = 4
FLAT_RISE = 0.03
FORMAT_RISE = 0.2
LENGTH_RATIO = 1.5
LENGTH_TOKENS = 16


def _flat_windows(run: Run) -> tuple[Window, Window] | None:
    """The beginning and now, if correctness has not risen between them by more than there is noise."""
    windows = both_windows(run, steps_between=FLAT_STEPS, groups=FLAT_GROUPS, generations=FLAT_GENERATIONS)
    before, now = (window.mean("right") for window in windows) if windows else (None, None)
    return windows if before is not None and now is not None and now - before < FLAT_RISE else None


def _format_alone(run: Run) -> Found | None:
    windows = _flat_windows(run)
    before, now = (window.mean("formatted") for window in windows) if windows else (None, None)
    if windows is None or before is None or now is None or now - before < FORMAT_RISE:
        return None
    return Found(
        f"From the first {windows[0].completions} to the last {windows[1].completions} completions the format went "
        f"from {before:.0%} to {now:.0%} of full marks, and right completions from {windows[0].mean('right'):.0%} to "
        f"{windows[1].mean('right'):.0%}.",
        windows[1].step,
    )


def _longer(run: Run) -> Found | None:
    windows = _flat_windows(run)
    name = "completions/mean_length"
    before, now = earliest(run, name, FLAT_GENERATIONS), latest(run, name, FLAT_GENERATIONS)
    if windows is None or not before or not now:
        return None
    if mean(now) < LENGTH_RATIO * mean(before) or mean(now) - mean(before) < LENGTH_TOKENS:
        return None
    return Found(
        f"Completions went from {mean(before):.0f} to {mean(now):.0f} tokens, and right ones from "
        f"{windows[0].mean('right'):.0%} to {windows[1].mean('right'):.0%}.",
        windows[1].step,
    )


# The policy gets worse than it was. Groups of a prompt are alike, so the noise is that of groups, not completions.
WORSE_GROUPS = 16
WORSE_GENERATIONS = 2
WORSE_RIGHT_RATIO = 0.5
WORSE_RIGHT = 0.1
WORSE_FORMAT = 0.3


def _worse(run: Run) -> Found | None:
    windows = both_windows(run, groups=WORSE_GROUPS, generations=WORSE_GENERATIONS)
    if windows is None:
        return None
    fell = []
    before, now = (window.mean("right") for window in windows)
    if before is not None and now is not None and now <= WORSE_RIGHT_RATIO * before and before - now >= WORSE_RIGHT:
        fell.append(f"right completions fell from {before:.0%} to {now:.0%}")
    before, now = (window.mean("formatted") for window in windows)
    if before is not None and now is not None and before - now >= WORSE_FORMAT:
        fell.append(f"the format fell from {before:.0%} to {now:.0%} of full marks")
    if not fell:
        return None
    return Found(
        f"From the first {windows[0].completions} to the last {windows[1].completions} completions "
        f"{' and '.join(fell)}, with learning_rate={_setting(run, 'learning_rate')}.",
        windows[1].step,
    )


# A learning rate of nothing.
ZERO_LOGS = 3
SMALL_RATE = 1e-8
SMALL_RATE_STEPS = 10


def _rate_zero(run: Run) -> Found | None:
    # A schedule may begin at 0, and end there: both are single steps.
    values = latest(run, "learning_rate", ZERO_LOGS)
    if not values or any(value != 0 for _, value in values):
        return None
    setting = f"learning_rate={_setting(run, 'learning_rate')}, lr_scheduler_type={_setting(run, 'lr_scheduler_type')}"
    return Found(f"It was 0 at steps {values[0][0]} to {values[-1][0]} ({setting}).", values[0][0])


def _rate_small(run: Run) -> Found | None:
    rate = run.settings.get("learning_rate")
    if not isinstance(rate, int | float) or not 0 < rate < SMALL_RATE or run.last_step < SMALL_RATE_STEPS:
        return None
    return Found(f"learning_rate={rate:g}, after {run.last_step} steps.", 1)


# No gradient. The loss alone says nothing: on the first pass it is 0 where the gradient is not.
NO_GRADIENT_LOGS = 5
NO_GRADIENT_GENERATIONS = 2


def _no_gradient(run: Run) -> Found | None:
    values = latest(run, "grad_norm", NO_GRADIENT_LOGS)
    window = last_window(run, generations=NO_GRADIENT_GENERATIONS)
    if window is None or not values or any(value != 0 for _, value in values):
        return None
    if window.total("silent") == window.groups:  # then that is why, and there are rules for it
        return None
    return Found(f"The gradient's norm was 0 in each log from step {values[0][0]} to {values[-1][0]}.", values[0][0])


# Entropy, and the distances that the policy has gone.
ENTROPY_RATIO = 0.1
ENTROPY_RIGHT = 0.5
ENTROPY_VALUES = 8
KL_REFERENCE = 0.5
KL_VALUES = 8
KL_PASSES = 0.025
PASSES = 5
MOST_PASSES = 64


def _entropy(run: Run) -> Found | None:
    before, now = earliest(run, "entropy", ENTROPY_VALUES), latest(run, "entropy", ENTROPY_VALUES)
    window = last_window(run, groups=WORSE_GROUPS, generations=WORSE_GENERATIONS)
    right = window.mean("right") if window else None
    if not before or not now or window is None or (right is not None and right >= ENTROPY_RIGHT):
        return None
    if median(now) >= ENTROPY_RATIO * median(before):
        return None
    learned = "" if right is None else f", and {right:.0%} of completions are right"
    return Found(f"Entropy went from {median(before):.3g} to {median(now):.3g} nats a token{learned}.", now[0][0])


def _kl_reference(run: Run) -> Found | None:
    values = latest(run, "kl", KL_VALUES)
    if not values or median(values) <= KL_REFERENCE:
        return None
    return Found(
        f"It was {median(values):.2g} nats a token over the last {KL_VALUES} values, with beta="
        f"{_setting(run, 'beta')}.",
        values[0][0],
    )


def _kl_passes(run: Run) -> Found | None:
    found = _farthest_pass(run, "approx_kl")
    if found is None or found[1] <= KL_PASSES:
        return None
    number, value, step = found
    return Found(
        f"In pass {number} over a batch of rollouts the policy was {value:.2g} nats a token from the one that sampled "
        f"(median of {PASSES} passes), with learning_rate={_setting(run, 'learning_rate')} and "
        f"num_iterations={_setting(run, 'num_iterations')}.",
        step,
    )


def _farthest_pass(run: Run, name: str) -> tuple[int, float, int] | None:
    """The pass in which a metric is largest in the median: its number, that median, and since when."""
    found = []
    for number in range(1, min(_number(run, "num_iterations", 1), MOST_PASSES) + 1):
        values = latest(run, f"iteration/{number}/{name}", PASSES)
        if values:
            found.append((number, median(values), values[0][0]))
    return max(found, key=lambda item: item[1], default=None)


# The clip.
CLIP_NEVER = 1e-5
CLIP_NEVER_PASSES = 10
CLIP_MOST = 0.5


def _clip_never(run: Run) -> Found | None:
    passes = _number(run, "num_iterations", 1)
    values = latest(run, f"iteration/{passes}/clip_ratio", CLIP_NEVER_PASSES) if passes > 1 else []
    rates = latest(run, "learning_rate", CLIP_NEVER_PASSES)
    peak = run.settings.get("learning_rate")
    # At the end of a schedule, where steps are small, the clip has nothing to do.
    is_late = isinstance(peak, int | float) and bool(rates) and mean(rates) < peak / 2
    if not values or is_late or mean(values) > CLIP_NEVER:
        return None
    return Found(
        f"In pass {passes} it bound for {mean(values):.2g} of tokens, over the last {CLIP_NEVER_PASSES} such passes.",
        values[0][0],
    )


def _clip_mostly(run: Run) -> Found | None:
    found = _farthest_pass(run, "clip_ratio")
    if found is None or found[1] <= CLIP_MOST:
        return None
    number, value, step = found
    return Found(f"In pass {number} it bound for {value:.0%} of tokens (median of {PASSES} passes).", step)


# Who sampled and who is trained.
SAMPLER_RATIO = 0.7
SAMPLER_LOGP = 0.1
SAMPLER_GROWTH = 3.0
SAMPLER_GROWN_LOGP = 0.03
SAMPLER_VALUES = 8
OLD_STEPS = 8
OLD_KL = 0.05
OLD_CLIP = 0.2


def _sampler(run: Run) -> Found | None:
    ratios = latest(run, "sampling/importance_sampling_ratio/mean", SAMPLER_VALUES)
    name = "sampling/sampling_logp_difference/mean"
    now, before = latest(run, name, SAMPLER_VALUES), earliest(run, name, SAMPLER_VALUES)
    said = []
    if ratios and not SAMPLER_RATIO <= median(ratios) <= 1 / SAMPLER_RATIO:
        said.append(f"the mean importance weight is {median(ratios):.2g}")
    if now:
        value, first = median(now), median(before or now)
        if value > SAMPLER_LOGP or (value > SAMPLER_GROWN_LOGP and value > SAMPLER_GROWTH * first):
            said.append(f"log-probabilities differ by {value:.2g} nats a token, by {first:.2g} at the beginning")
    if not said:
        return None
    step = (ratios or now)[0][0]
    return Found(f"In the median of the last {SAMPLER_VALUES} generations {' and '.join(said)}.", step)


def _old(run: Run) -> Found | None:
    accumulation = max(1, _number(run, "gradient_accumulation_steps", 1))
    steps = _number(run, "num_iterations", 1) * _number(run, "steps_per_generation", accumulation) // accumulation
    if steps < OLD_STEPS:
        return None
    kl, clip = _farthest_pass(run, "approx_kl"), _farthest_pass(run, "clip_ratio")
    said = []
    if kl is not None and kl[1] > OLD_KL:
        said.append(f"KL to the policy that sampled is {kl[1]:.2g} nats a token in pass {kl[0]}")
    if clip is not None and clip[1] > OLD_CLIP:
        said.append(f"the clip binds for {clip[1]:.0%} of tokens in pass {clip[0]}")
    if not said:
        return None
    step = kl[2] if kl is not None else 1
    return Found(f"Rollouts are used for {steps} optimizer steps, and {' and '.join(said)}.", step)


# What costs time.
WAITING_RATIO = 1.3
WAITING_VALUES = 8
GPU_UTILIZATION = 0.5
GPU_VALUES = 20
TIME_STEPS = 20
REWARDS_SHARE = 0.3
GENERATION_SHARE = 0.7


def _waiting(run: Run) -> Found | None:
    values = latest(run, "update/slowest_rank", WAITING_VALUES)
    if not values or median(values) <= WAITING_RATIO:
        return None
    return Found(
        f"The process with most tokens computes {median(values):.2f} times as many as the mean (median of "
        f"{WAITING_VALUES} generations), and the others wait for it.",
        values[0][0],
    )


def _gpu_waits(run: Run) -> Found | None:
    values = latest(run, "gpu/utilization", GPU_VALUES)
    if not values or median(values) >= GPU_UTILIZATION:
        return None
    return Found(
        f"It was busy {median(values):.0%} of the time in the median of the last {GPU_VALUES} steps.", values[0][0]
    )


def _shares_of_time(run: Run) -> tuple[dict[str, float], int] | None:
    steps = run.steps[-TIME_STEPS:]
    seconds = {
        name: sum(step.seconds.get(name, 0.0) for step in steps) for name in ("generation", "rewards", "update")
    }
    total = sum(seconds.values())
    if len(steps) < TIME_STEPS or total <= 0:
        return None
    return {name: value / total for name, value in seconds.items()}, steps[0].step


def _slow_rewards(run: Run) -> Found | None:
    found = _shares_of_time(run)
    if found is None or found[0]["rewards"] <= REWARDS_SHARE:
        return None
    return Found(f"They took {found[0]['rewards']:.0%} of the last {TIME_STEPS} steps.", found[1])


def _slow_generation(run: Run) -> Found | None:
    found = _shares_of_time(run)
    has_faster = str(run.about.get("device", "cpu")) != "cpu" and not run.settings.get("use_vllm")
    if found is None or not has_faster or found[0]["generation"] <= GENERATION_SHARE:
        return None
    return Found(f"It took {found[0]['generation']:.0%} of the last {TIME_STEPS} steps.", found[1])


def _rewards(run: Run, kind: str) -> list[RewardAbout]:
    return [reward for reward in run.rewards if reward.kind == kind]


def _severity_of(reward: RewardAbout) -> str:
    return HINT if reward.weight == 0 else PROBLEM  # a weight of 0 makes it a metric


def _setting(run: Run, name: str) -> str:
    value = run.settings.get(name, "unknown")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(run: Run, name: str, default: int) -> int:
    value = run.settings.get(name)
    return value if isinstance(value, int) and value > 0 else default


def _quoted(text: str, chars: int = 60) -> str:
    """A model's text or a reference inside a line: short, and without what would break the line or the screen."""
    return repr(text if len(text) <= chars else f"{text[: chars // 2]}...{text[-chars // 2 :]}")


def _silent_threshold(reason: str, groups: int = SILENT_GROUPS) -> str:
    return (
        f"in at least {SILENT_SHARE:.0%} of {_last('groups', groups, SILENT_GENERATIONS)} all rewards are "
        f"equal, most often because {reason}"
    )


def _last(what: str, count: int, generations: int) -> str:
    return f"the last {count} {what} and {generations} generations"


RULES: tuple[Rule, ...] = (
    Rule(
        "truncated-completions",
        "Most completions are cut off before they end",
        f"at least {TRUNCATED_SHARE:.0%} of {_last('completions', TRUNCATED_COMPLETIONS, TRUNCATED_GENERATIONS)} are "
        "cut off",
        "Raise max_completion_length: its default of 256 tokens is too small for a model that thinks, which needs "
        "1,024 or more. mask_truncated_completions=True leaves cut ones out, and helps only while they are few.",
        PROBLEM,
        _truncated,
    ),
    Rule(
        "unscored-references",
        "Rewards for correctness cannot score completions",
        f"at least {UNSCORED_SHARE:.0%} of {_last('completions', UNSCORED_COMPLETIONS, UNSCORED_GENERATIONS)} have no "
        "score for correctness",
        "Look at the references: `trl-grpo-ext audit` lists those that do not get full marks. Mend the column, or the "
        "function that reads it.",
        PROBLEM,
        _unscored,
    ),
    Rule(
        "reward-not-finite",
        "A reward function returns infinities",
        f"any infinity in the last {INFINITE_GENERATIONS} generations",
        "Bound what the function returns. One infinity makes the advantages of its whole group NaN.",
        PROBLEM,
        _not_finite,
    ),
    Rule(
        "reward-without-scores",
        "A reward function never gives a score",
        f"None or NaN for each of {_last('completions', DEAD_COMPLETIONS, DEAD_GENERATIONS)}",
        "Call the function on a completion by hand, with the data set's columns. Leave it out if it is "
        "for other rows.",
        PROBLEM,
        _without_scores,
        explained_by=("unscored-references",),
    ),
    Rule(
        "no-format",
        "No completion has the format that the rewards look for",
        f"none of {_last('completions', NEVER_COMPLETIONS, NEVER_GENERATIONS)} is right, and format rewards pay less "
        f"than {NO_FORMAT:.0%} of their full marks",
        "Ask for the tags in the system prompt exactly as the rewards spell them, show an example (prompt_example of "
        "the recipe), or take rewards that fit what the model writes. What never occurs cannot be learned.",
        PROBLEM,
        _no_format,
        explained_by=("truncated-completions",),
    ),
    Rule(
        "never-right",
        "No completion is ever right",
        f"none of {_last('completions', NEVER_COMPLETIONS, NEVER_GENERATIONS)} is right",
        "Compare references with extracted answers in the report: a wrong column or another notation never matches. "
        "If they are alike, the problems are too hard for this model: begin with easier ones.",
        PROBLEM,
        _never_right,
        explained_by=("truncated-completions", "unscored-references", "learning-rate-too-high"),
    ),
    Rule(
        "groups-unscored",
        "Most groups have no scores at all",
        _silent_threshold("no completion has a score"),
        "See which reward functions return None or NaN for all completions of a prompt, and why.",
        PROBLEM,
        _silent_groups("unscored"),
        explained_by=("unscored-references", "reward-without-scores"),
    ),
    Rule(
        "groups-without-format",
        "Most groups teach nothing, for no completion has the format",
        _silent_threshold("no completion is right or has any of the format"),
        "Ask for the tags in the system prompt exactly as the rewards spell them, or show an example.",
        PROBLEM,
        _silent_groups("without format"),
        explained_by=("truncated-completions", "no-format"),
    ),
    Rule(
        "groups-all-wrong",
        "Most groups teach nothing, for no completion is right",
        _silent_threshold("no completion is right"),
        "Take easier problems first, or more completions of each (num_generations), so that some are right.",
        PROBLEM,
        _silent_groups("wrong"),
        explained_by=(
            "truncated-completions",
            "unscored-references",
            "no-format",
            "never-right",
            "learning-rate-too-high",
        ),
    ),
    Rule(
        "groups-all-right",
        "Most groups teach nothing, for all completions are right",
        _silent_threshold("all completions are right")
        + f", and right ones have not become more by {LEARNED_RIGHT:.0%} since the beginning",
        "Take harder problems, or leave out those that the model always solves. If it should not solve them, see "
        "whether the reward pays for anything.",
        PROBLEM,
        _all_right,
    ),
    Rule(
        "groups-all-equal",
        "Most groups teach nothing, for all their rewards are equal",
        _silent_threshold("of another reason"),
        "See whether completions of a prompt are all the same (raise temperature), and whether the rewards can tell "
        "better completions from worse ones.",
        PROBLEM,
        _silent_groups("others"),
        explained_by=(
            "unscored-references",
            "reward-not-finite",
            "reward-without-scores",
            "groups-unscored",
            "constant-reward",
            "never-right",
        ),
    ),
    Rule(
        "constant-reward",
        "A reward function gives every completion the same score",
        f"one value, not full marks, for {_last('completions', DEAD_COMPLETIONS, DEAD_GENERATIONS)}, and the same at "
        "the beginning",
        "A constant cancels within a group and teaches nothing: call the function on a good and a bad completion by "
        "hand, mend it, or leave it out.",
        PROBLEM,
        _constant,
        explained_by=("truncated-completions", "no-format", "groups-all-right"),
    ),
    Rule(
        "dominant-reward",
        "Other rewards drown correctness",
        f"other rewards make more than {DOMINANT_SHARE:.0%} of the advantage over "
        f"{_last('groups', DOMINANT_GROUPS, DOMINANT_GENERATIONS)}, while correctness differs within at least "
        f"{DOMINANT_SPREAD:.0%} of groups and less than {DOMINANT_RIGHT:.0%} of completions are right",
        "Lower the weights of these rewards (reward_weights), or raise that of correctness, until it makes most of "
        "the advantage.",
        PROBLEM,
        _dominant,
    ),
    Rule(
        "learning-rate-zero",
        "The learning rate is 0",
        f"{ZERO_LOGS} logs in a row",
        "Set learning_rate, or a schedule (max_steps, lr_scheduler_type) that has not come to its end.",
        PROBLEM,
        _rate_zero,
    ),
    Rule(
        "learning-rate-too-high",
        "The policy is worse than it was at the beginning",
        f"over {_last('groups', WORSE_GROUPS, WORSE_GENERATIONS)}, right completions are at most "
        f"{WORSE_RIGHT_RATIO:.0%} of what they were over the first ones and {WORSE_RIGHT:.0%} of completions fewer, "
        f"or the format is {WORSE_FORMAT:.0%} of full marks lower",
        "Go back to a checkpoint or the start with a learning_rate three to ten times smaller; fewer passes "
        "(num_iterations), target_kl or max_grad_norm help too.",
        PROBLEM,
        _worse,
    ),
    Rule(
        "no-gradient",
        "The gradient is 0",
        f"its norm is 0 in {NO_GRADIENT_LOGS} logs in a row, while rewards differ within groups (a loss of 0 alone is "
        "no sign of it)",
        "See that parameters are trained at all (adapters, frozen layers), and that completions that carry an "
        "advantage are not all masked out.",
        PROBLEM,
        _no_gradient,
        explained_by=(
            "truncated-completions",
            "unscored-references",
            "reward-not-finite",
            "reward-without-scores",
            "no-format",
            "never-right",
            "groups-unscored",
            "groups-without-format",
            "groups-all-wrong",
            "groups-all-right",
            "groups-all-equal",
            "constant-reward",
            "data-too-easy",
        ),
    ),
    Rule(
        "kl-to-reference",
        "The policy runs away from the reference",
        f"the median of the last {KL_VALUES} values of `kl` is above {KL_REFERENCE:g} nats a token",
        "Lower learning_rate, or raise beta, which holds the policy back.",
        PROBLEM,
        _kl_reference,
    ),
    Rule(
        "old-rollouts",
        "Rollouts are too old when they are used",
        f"they are used for {OLD_STEPS} optimizer steps or more, and in the median of {PASSES} passes KL to the "
        f"policy that sampled is above {OLD_KL:g} nats a token or the clip binds for more than "
        f"{OLD_CLIP:.0%} of tokens",
        "Lower steps_per_generation or num_iterations, raise gradient_accumulation_steps, or set target_kl, which "
        "ends the passes in time.",
        PROBLEM,
        _old,
    ),
    Rule(
        "kl-of-passes",
        "The policy moves too far within the passes over a batch of rollouts",
        f"the median of {PASSES} passes' KL to the policy that sampled is above {KL_PASSES:g} nats a token",
        "Set target_kl (0.01 to 0.05), or lower learning_rate or num_iterations.",
        PROBLEM,
        _kl_passes,
        explained_by=("old-rollouts",),
    ),
    Rule(
        "clip-binds-mostly",
        "The clip binds for most tokens",
        f"the median of {PASSES} passes' clip_ratio is above {CLIP_MOST:.0%}",
        "Most of the gradient is cut away: lower learning_rate or num_iterations, or set target_kl.",
        PROBLEM,
        _clip_mostly,
        explained_by=("old-rollouts",),
    ),
    Rule(
        "sampler-disagrees",
        "Sampler and trainer disagree",
        f"in the median of {SAMPLER_VALUES} generations the mean importance weight is below {SAMPLER_RATIO:g} or "
        f"above {1 / SAMPLER_RATIO:.2g}, or log-probabilities differ by more than {SAMPLER_LOGP:g} nats a token, or "
        f"by more than {SAMPLER_GROWN_LOGP:g} and {SAMPLER_GROWTH:g} times as much as at the beginning",
        "See that vLLM has the trainer's weights, precision (dtype, quantization, KV cache) and sampling settings, "
        "and leave vllm_importance_sampling_correction on.",
        PROBLEM,
        _sampler,
    ),
    Rule(
        "entropy-collapse",
        "Entropy has collapsed before anything was learned",
        f"the median of the last {ENTROPY_VALUES} values is below {ENTROPY_RATIO:.0%} of that of the first, and less "
        f"than {ENTROPY_RIGHT:.0%} of completions are right",
        "Completions of a prompt become all the same: raise temperature or epsilon_high, or lower learning_rate.",
        PROBLEM,
        _entropy,
        explained_by=("learning-rate-too-high",),
    ),
    Rule(
        "format-without-correctness",
        "The format is learned, and correctness is not",
        f"after {FLAT_STEPS} steps or more, format rewards pay {FORMAT_RISE:.0%} of full marks more than over the "
        f"first {FLAT_GROUPS} groups, and right completions have not become more by {FLAT_RISE:.0%}",
        "Raise the weight of correctness, and see in the report whether right answers are graded as right. If they "
        "are, take easier problems or more completions of each.",
        PROBLEM,
        _format_alone,
        explained_by=("unscored-references", "never-right", "dominant-reward"),
    ),
    Rule(
        "length-without-correctness",
        "Completions grow longer, and correctness does not",
        f"after {FLAT_STEPS} steps or more, they are {LENGTH_RATIO:g} times and {LENGTH_TOKENS} tokens longer than "
        f"the first, and right completions have not become more by {FLAT_RISE:.0%}",
        "Look at late completions: repetition, or a reward that pays for length. loss_type='dapo' or 'dr_grpo' does "
        "not favour long wrong completions, and a reward for brevity holds them back.",
        PROBLEM,
        _longer,
        explained_by=("truncated-completions",),
    ),
    Rule(
        "slow-rewards",
        "Rewards take much of the time",
        f"more than {REWARDS_SHARE:.0%} of the last {TIME_STEPS} steps",
        "Make the slow function asynchronous (`async def`), call what it waits for in batches or in processes, or "
        "keep its results.",
        PROBLEM,
        _slow_rewards,
    ),
    Rule(
        "waiting-ranks",
        "Processes wait for the slowest one",
        f"the median of {WAITING_VALUES} values of update/slowest_rank is above {WAITING_RATIO:g}",
        "Set tokens_per_micro_batch='auto', give each process more groups, or shorten the longest completions.",
        PROBLEM,
        _waiting,
    ),
    Rule(
        "data-too-easy",
        "The data has become too easy",
        _silent_threshold("all completions are right", EASY_GROUPS)
        + f", and right ones have become more by {LEARNED_RIGHT:.0%} or more since the beginning",
        "It has been learned: stop, or go on with harder problems.",
        HINT,
        _too_easy,
    ),
    Rule(
        "clip-never-binds",
        "The passes after the first change next to nothing",
        f"with num_iterations > 1 the clip binds for {CLIP_NEVER:g} of tokens or less over {CLIP_NEVER_PASSES} of the "
        "last passes, while the learning rate is at least half of what is set",
        "A higher learning_rate, or more passes, would use the same rollouts better; or save the time with fewer.",
        HINT,
        _clip_never,
        explained_by=("learning-rate-zero", "learning-rate-small", "no-gradient"),
    ),
    Rule(
        "learning-rate-small",
        "The learning rate is next to nothing",
        f"learning_rate is below {SMALL_RATE:g}",
        "1e-6 is usual for whole models, 1e-5 for adapters.",
        HINT,
        _rate_small,
    ),
    Rule(
        "gpu-waits",
        "The GPU waits for the host",
        f"the median of gpu/utilization over {GPU_VALUES} steps is below {GPU_UTILIZATION:.0%}",
        "Larger batches, tokens_per_micro_batch='auto' and vLLM for sampling keep it busy; slow rewards "
        "leave it idle.",
        HINT,
        _gpu_waits,
        explained_by=("slow-rewards",),
    ),
    Rule(
        "slow-generation",
        "Sampling takes most of the time",
        f"more than {GENERATION_SHARE:.0%} of the last {TIME_STEPS} steps on an accelerator without vLLM",
        "Set use_vllm=True, or make more of the same completions with more passes (num_iterations).",
        HINT,
        _slow_generation,
    ),
)


def diagnose(run: Run) -> list[Finding]:
    """What is wrong with a run, as far as it has come: problems first, in the order of the rules.

    Args:
        run ([`~trl_grpo_ext.report.record.Run`]):
            The run. Where its record says since when a finding holds, its step is that one.

    Returns:
        `list[Finding]`
    """
    since = open_findings(run)
    return [
        replace(finding, step=min(finding.step, since.get(finding.rule, finding.step)))
        for finding in unexplained(holding(run))
    ]


def holding(run: Run) -> dict[str, Finding]:
    """What the rules find, by their names, with what follows from something else."""
    found = ((rule.name, rule.look(run)) for rule in RULES)
    return {name: finding for name, finding in found if finding is not None}


def unexplained(found: dict[str, Finding]) -> list[Finding]:
    """Of what rules have found that which follows from nothing else, problems first."""
    explained = {rule.name for rule in RULES if any(name in found for name in rule.explained_by)}
    findings = [finding for name, finding in found.items() if name not in explained]
    return sorted(findings, key=lambda finding: finding.severity != PROBLEM)


def open_findings(run: Run) -> dict[str, int]:
    """The rules that hold as the run's record has it, with the step since which."""
    since: dict[str, int] = {}
    for event in run.findings:
        if event.holds:
            since.setdefault(event.rule, event.step)
        else:
            since.pop(event.rule, None)
    return since


def doctor_table() -> list[tuple[str, str, str]]:
    """The rules as a table: name, when it fires, what to do."""
    return [(rule.name, rule.threshold, rule.remedy) for rule in RULES]


def doctor_markdown() -> str:
    """[`doctor_table`] in Markdown, with titles."""
    rows = [f"| `{r.name}` ({r.severity}) | {r.title} | {r.threshold} | {r.remedy} |" for r in RULES]
    return "\n".join(["| rule | what it says | when it fires | what to do |", "|---|---|---|---|", *rows]) + "\n"
