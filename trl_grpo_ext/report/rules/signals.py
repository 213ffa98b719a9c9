"""Is there anything to learn from: completions, references, rewards, groups? Imports no torch."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..findings import HINT, Found, rule
from ..generations import CORRECTNESS, FORMAT, RewardAbout, RewardStatistics
from ..record import Run
from ..windows import LOOK_BACK, Window, both_windows, first_window, last_window, latest, mean
from .common import joined, quoted, rewards_of_kind, setting, the_last


# Truncation. TRL's default length is 256 tokens: a model that thinks has every completion cut off before its answer,
# rewards of 0, and learns nothing (TRL issue 5697).
TRUNCATED_SHARE = 0.5
TRUNCATED_COMPLETIONS = 32
TRUNCATED_GENERATIONS = 2


@rule(
    "truncated-completions",
    "Most completions are cut off before they end",
    when=f"at least {TRUNCATED_SHARE:.0%} of {the_last('completions', TRUNCATED_COMPLETIONS, TRUNCATED_GENERATIONS)} "
    "are cut off",
    remedy="Raise max_completion_length: its default of 256 tokens is too small for a model that thinks, which needs "
    "1,024 or more. mask_truncated_completions=True leaves cut ones out, and helps only while they are few.",
)
def truncated_completions(run: Run) -> Found | None:
    window = last_window(run, completions=TRUNCATED_COMPLETIONS, generations=TRUNCATED_GENERATIONS)
    values = latest(run, "completions/clipped_ratio", len(window.generations)) if window else []
    if window is None or not values or mean(values) < TRUNCATED_SHARE:
        return None
    masked = bool(run.settings.get("mask_truncated_completions"))
    consequence = "they carry no gradient" if masked else "they are scored without their ends, so mostly as wrong"
    return Found(
        f"{mean(values):.0%} of the last {window.completions} completions were cut off at max_completion_length="
        f"{setting(run, 'max_completion_length')}; with mask_truncated_completions={masked} {consequence}.",
        values[0][0],
    )


# References that cannot be scored.
UNSCORED_SHARE = 0.1
UNSCORED_COMPLETIONS = 64
UNSCORED_GENERATIONS = 2


@rule(
    "unscored-references",
    "Rewards for correctness cannot score completions",
    when=f"at least {UNSCORED_SHARE:.0%} of {the_last('completions', UNSCORED_COMPLETIONS, UNSCORED_GENERATIONS)} "
    "have no score for correctness",
    remedy="Look at the references: `trl-grpo-ext audit` lists those that do not get full marks. Mend the column, or "
    "the function that reads it.",
)
def unscored_references(run: Run) -> Found | None:
    window = last_window(run, completions=UNSCORED_COMPLETIONS, generations=UNSCORED_GENERATIONS)
    rewards = rewards_of_kind(run, CORRECTNESS)
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
        "" if sample is None or sample.reference is None else f", as with the reference {quoted(sample.reference)}"
    )
    return Found(
        f"{' and '.join(names)} gave no score to {share:.0%} of the last {window.completions} completions{example}.",
        window.step,
    )


# No completion is ever right.
NEVER_COMPLETIONS = 192
NEVER_GENERATIONS = 3
WRONG_COMPLETIONS = 320  # where the format is there, and hard problems may still be solved at times
NO_FORMAT = 0.02  # of full marks


@rule(
    "no-format",
    "No completion has the format that the rewards look for",
    when=f"none of {the_last('completions', NEVER_COMPLETIONS, NEVER_GENERATIONS)} is right, and format rewards pay "
    f"less than {NO_FORMAT:.0%} of their full marks",
    remedy="Ask for the tags in the system prompt exactly as the rewards spell them, show an example (prompt_example "
    "of the recipe), or take rewards that fit what the model writes. What never occurs cannot be learned.",
    explained_by=("truncated-completions",),
)
def no_format(run: Run) -> Found | None:
    window = _never_right_window(run)
    formatted = window.mean("formatted") if window else None
    if window is None or formatted is None or formatted >= NO_FORMAT:
        return None
    wrote = next((f", such as {quoted(sample.completion)}" for sample in window.samples), "")
    return Found(
        f"None of the last {window.completions} completions was right, and rewards for the format paid them "
        f"{formatted:.1%} of full marks{wrote}.",
        window.step,
    )


@rule(
    "never-right",
    "No completion is ever right",
    when=f"none of {the_last('completions', WRONG_COMPLETIONS, NEVER_GENERATIONS)} is right, nor was any before, and "
    "it is not no-format",
    remedy="Compare references with extracted answers in the report: a wrong column or another notation never "
    "matches. If they are alike, the problems are too hard for this model: begin with easier ones.",
    explained_by=("truncated-completions", "unscored-references", "learning-rate-too-high"),
)
def never_right(run: Run) -> Found | None:
    window = _never_right_window(run, WRONG_COMPLETIONS)
    formatted = window.mean("formatted") if window else None
    if window is None or (formatted is not None and formatted < NO_FORMAT) or _was_ever_right(run):
        return None
    answered = [sample for sample in window.samples if sample.extracted and sample.reference is not None]
    example = ""
    if answered:
        answer, reference = quoted(answered[0].extracted or ""), quoted(answered[0].reference or "")
        example = f"; the answer {answer} was compared with the reference {reference}"
    has_format = "" if formatted is None else f" although the format is there ({formatted:.0%} of full marks)"
    return Found(f"None of the last {window.completions} completions was right{has_format}{example}.", window.step)


def _never_right_window(run: Run, completions: int = NEVER_COMPLETIONS) -> Window | None:
    window = last_window(run, completions=completions, generations=NEVER_GENERATIONS)
    right = window.mean("right") if window else None
    return window if right == 0 else None


def _was_ever_right(run: Run) -> bool:
    found = (*run.generations[:LOOK_BACK], *run.generations[-LOOK_BACK:])
    return any((generation.statistics.right or 0) > 0 for generation in found)


# Groups whose rewards are all equal have no advantage.
SILENT_SHARE = 0.75
SILENT_GROUPS = 48
SILENT_GENERATIONS = 3
EASY_GROUPS = 64
# Groups that are all right are a problem from the start, and later what has been achieved.


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
            f"of them {_SILENT_REASONS[kind]}, with num_generations={setting(run, 'num_generations')}.",
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


def _silent_threshold(reason: str, groups: int = SILENT_GROUPS) -> str:
    return (
        f"in at least {SILENT_SHARE:.0%} of {the_last('groups', groups, SILENT_GENERATIONS)} all rewards are "
        f"equal, most often because {reason}"
    )


groups_unscored = rule(
    "groups-unscored",
    "Most groups have no scores at all",
    when=_silent_threshold("no completion has a score"),
    remedy="See which reward functions return None or NaN for all completions of a prompt, and why.",
    explained_by=("unscored-references", "reward-without-scores"),
)(_silent_groups("unscored"))

groups_without_format = rule(
    "groups-without-format",
    "Most groups teach nothing, for no completion has the format",
    when=_silent_threshold("no completion is right or has any of the format"),
    remedy="Ask for the tags in the system prompt exactly as the rewards spell them, or show an example.",
    explained_by=("truncated-completions", "no-format"),
)(_silent_groups("without format"))

groups_all_wrong = rule(
    "groups-all-wrong",
    "Most groups teach nothing, for no completion is right",
    when=_silent_threshold("no completion is right"),
    remedy="Take easier problems first, or more completions of each (num_generations), so that some are right.",
    explained_by=(
        "truncated-completions",
        "unscored-references",
        "no-format",
        "never-right",
        "learning-rate-too-high",
    ),
)(_silent_groups("wrong"))

PAYS_MORE = 0.1


def _all_equal(run: Run) -> Found | None:
    """Where no reward is for correctness, groups that are all equal are also what has been learned."""
    found = _silent_groups("others")(run)
    windows = both_windows(run, groups=SILENT_GROUPS, generations=SILENT_GENERATIONS) if found else None
    return found if windows is None or not any(_pays_more(windows, reward) for reward in run.rewards) else None


def _pays_more(windows: tuple[Window, Window], reward: RewardAbout) -> bool:
    seen = [[f for f in window.of(reward) if f.mean is not None] for window in windows]
    if reward.weight <= 0 or not all(seen):
        return False
    before, now = (sum(f.mean or 0.0 for f in found) / len(found) for found in seen)
    low, high = _range([f for found in seen for f in found])
    return now - before >= PAYS_MORE * (high - low) > 0


def _range(found: Sequence[RewardStatistics]) -> tuple[float, float]:
    """The lowest and the highest score, 0 and 0 without any."""
    lows = [f.low for f in found if f.low is not None]
    highs = [f.high for f in found if f.high is not None]
    return min(lows, default=0.0), max(highs, default=0.0)


groups_all_equal = rule(
    "groups-all-equal",
    "Most groups teach nothing, for all their rewards are equal",
    when=_silent_threshold("of another reason")
    + f", and no reward pays more by {PAYS_MORE:.0%} of what it can differ by than at the beginning",
    remedy="See whether completions of a prompt are all the same (raise temperature), and whether the rewards can "
    "tell better completions from worse ones.",
    explained_by=(
        "unscored-references",
        "reward-not-finite",
        "reward-without-scores",
        "groups-unscored",
        "constant-reward",
        "never-right",
    ),
)(_all_equal)


@rule(
    "groups-all-right",
    "Most groups teach nothing, for all completions are right",
    when=_silent_threshold("all completions are right") + ", and that was so at the beginning",
    remedy="Take harder problems, or leave out those that the model always solves. If it should not solve them, see "
    "whether the reward pays for anything.",
)
def groups_all_right(run: Run) -> Found | None:
    found = _silent_groups("right")(run)
    return found if found is not None and not _was_harder(run) else None


@rule(
    "data-too-easy",
    "The data has become too easy",
    when=_silent_threshold("all completions are right", EASY_GROUPS) + ", and that was not so at the beginning",
    remedy="It has been learned: stop, or go on with harder problems.",
    severity=HINT,
)
def data_too_easy(run: Run) -> Found | None:
    found = _silent_groups("right", EASY_GROUPS)(run)
    return found if found is not None and _was_harder(run) else None


def _was_harder(run: Run) -> bool:
    first = first_window(run, groups=SILENT_GROUPS, generations=SILENT_GENERATIONS)
    return first is not None and first.share("silent_right") < SILENT_SHARE / 2


# Rewards that are no rewards.
INFINITE_GENERATIONS = 4
DEAD_COMPLETIONS = 256
DEAD_GENERATIONS = 4
_PENALTIES = re.compile("penal|punish|overlong|repetition", re.IGNORECASE)


@rule(
    "reward-not-finite",
    "A reward function returns infinities",
    when=f"any infinity in the last {INFINITE_GENERATIONS} generations",
    remedy="Bound what the function returns. One infinity makes the advantages of its whole group NaN.",
)
def reward_not_finite(run: Run) -> Found | None:
    window = Window(run.generations[-INFINITE_GENERATIONS:])
    counts = [(reward, sum(found.infinite for found in window.of(reward))) for reward in run.rewards]
    found = [
        (reward, f"gave an infinity to {count} of the last {window.completions} completions")
        for reward, count in counts
        if count
    ]
    return joined(found, window.step) if found else None


@rule(
    "reward-without-scores",
    "A reward function never gives a score",
    when=f"None or NaN for each of {the_last('completions', DEAD_COMPLETIONS, DEAD_GENERATIONS)}",
    remedy="Call the function on a completion by hand, with the data set's columns. Leave it out if it is "
    "for other rows.",
    explained_by=("unscored-references",),
)
def reward_without_scores(run: Run) -> Found | None:
    window = last_window(run, completions=DEAD_COMPLETIONS, generations=DEAD_GENERATIONS)
    if window is None:
        return None
    what = f"returned None or NaN for each of the last {window.completions} completions"
    dead = [
        (reward, what)
        for reward in run.rewards
        if reward.kind != CORRECTNESS and sum(found.unscored for found in window.of(reward)) == window.completions
    ]
    return joined(dead, window.step)


@rule(
    "constant-reward",
    "A reward function gives every completion the same score",
    when=f"one value for {the_last('completions', DEAD_COMPLETIONS, DEAD_GENERATIONS)}, and the same at the "
    "beginning; not full marks, nor 0 of a penalty",
    remedy="A constant cancels within a group and teaches nothing: call the function on a good and a bad completion "
    "by hand, mend it, or leave it out.",
    explained_by=("truncated-completions", "no-format", "groups-all-right"),
)
def constant_reward(run: Run) -> Found | None:
    """Rewards that have never said anything: they are constant now, and were the same at the beginning."""
    last = last_window(run, completions=DEAD_COMPLETIONS, generations=DEAD_GENERATIONS)
    if last is None:
        return None
    first = Window(run.generations[: len(last.generations)])
    found: list[tuple[RewardAbout, str]] = []
    to_come: list[tuple[RewardAbout, str]] = []
    for reward in run.rewards:
        value = _only_value(last, reward)
        if value is None or value != _only_value(first, reward) or _is_what_is_wanted(reward, value):
            continue
        if reward.kind == CORRECTNESS and value <= 0:
            continue  # never right has a rule of its own
        item = reward, f"gave {value:g} to each of the last {last.completions} completions, and to the first ones"
        # Format that nobody writes yet can come with the format that others pay for.
        (to_come if reward.kind == FORMAT and value <= 0 else found).append(item)
    if found or not to_come:
        return joined(found, first.step)
    only_to_come = joined(to_come, first.step)
    return replace(only_to_come, severity=HINT) if only_to_come else None


def _is_what_is_wanted(reward: RewardAbout, value: float) -> bool:
    """Full marks, of others' format rewards 1; and 0 of what only takes something away, as far as its name says."""
    if reward.full_marks is None:
        return (reward.kind == FORMAT and value == 1) or (value == 0 and bool(_PENALTIES.search(reward.name)))
    return value == reward.full_marks


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
DOMINANT_RANGE = 2.0  # times that of correctness: else they make the advantage only until they are learned


@rule(
    "dominant-reward",
    "Other rewards drown correctness",
    when=f"other rewards make more than {DOMINANT_SHARE:.0%} of the advantage over "
    f"{the_last('groups', DOMINANT_GROUPS, DOMINANT_GENERATIONS)} and differ by more than {DOMINANT_RANGE:g} times "
    f"what correctness does, while correctness differs within at least {DOMINANT_SPREAD:.0%} of groups and less than "
    f"{DOMINANT_RIGHT:.0%} of completions are right",
    remedy="Lower the weights of these rewards (reward_weights), or raise that of correctness, until it makes most of "
    "the advantage.",
)
def dominant_reward(run: Run) -> Found | None:
    window = last_window(run, groups=DOMINANT_GROUPS, generations=DOMINANT_GENERATIONS)
    right = window.mean("right") if window else None
    judges = [reward for reward in rewards_of_kind(run, CORRECTNESS) if reward.weight > 0]
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
    ranges = {reward.name: _weighted_range(run, window, reward) for reward in run.rewards}
    of_judges = sum(ranges[reward.name] for reward in judges)
    of_others = sum(ranges[name] for name in shares)
    if sum(shares.values()) <= DOMINANT_SHARE or of_others <= DOMINANT_RANGE * of_judges:
        return None
    name = max(shares, key=lambda name: shares[name])
    weights = {reward.name: f"{reward.weight:g}" for reward in run.rewards}
    return Found(
        f"Over the last {window.groups} groups rewards for other things make {sum(shares.values()):.0%} of the "
        f"advantage, {name} with a weight of {weights[name]} alone {shares[name]:.0%}, while {right:.0%} of "
        f"completions are right and correctness differs within {spread:.0%} of groups.",
        window.step,
    )


def _weighted_range(run: Run, window: Window, reward: RewardAbout) -> float:
    """By how much a reward function can change the sum, as far as is seen."""
    if run.settings.get("multi_objective_aggregation") == "normalize_then_sum":
        return abs(reward.weight)
    low, high = _range(window.of(reward))
    return abs(reward.weight) * (high - low)
