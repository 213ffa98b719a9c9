"""Is there anything to learn from: completions, references, rewards, groups? Imports no torch."""

from collections.abc import Callable
from dataclasses import replace

from ..findings import HINT, Found, rule
from ..generations import CORRECTNESS, FORMAT, RewardAbout
from ..record import Run
from ..windows import Window, both_windows, last_window, latest, mean
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
    when=f"none of {the_last('completions', NEVER_COMPLETIONS, NEVER_GENERATIONS)} is right, and it is not no-format",
    remedy="Compare references with extracted answers in the report: a wrong column or another notation never "
    "matches. If they are alike, the problems are too hard for this model: begin with easier ones.",
    explained_by=("truncated-completions", "unscored-references", "learning-rate-too-high"),
)
def never_right(run: Run) -> Found | None:
    window = _never_right_window(run)
    formatted = window.mean("formatted") if window else None
    if window is None or (formatted is not None and formatted < NO_FORMAT):
        return None
    answered = [sample for sample in window.samples if sample.extracted and sample.reference is not None]
    example = ""
    if answered:
        answer, reference = quoted(answered[0].extracted or ""), quoted(answered[0].reference or "")
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

groups_all_equal = rule(
    "groups-all-equal",
    "Most groups teach nothing, for all their rewards are equal",
    when=_silent_threshold("of another reason"),
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
)(_silent_groups("others"))


@rule(
    "groups-all-right",
    "Most groups teach nothing, for all completions are right",
    when=_silent_threshold("all completions are right")
    + f", and right ones have not become more by {LEARNED_RIGHT:.0%} since the beginning",
    remedy="Take harder problems, or leave out those that the model always solves. If it should not solve them, see "
    "whether the reward pays for anything.",
)
def groups_all_right(run: Run) -> Found | None:
    found = _silent_groups("right")(run)
    return found if found is not None and not _has_learned(run) else None


@rule(
    "data-too-easy",
    "The data has become too easy",
    when=_silent_threshold("all completions are right", EASY_GROUPS)
    + f", and right ones have become more by {LEARNED_RIGHT:.0%} or more since the beginning",
    remedy="It has been learned: stop, or go on with harder problems.",
    severity=HINT,
)
def data_too_easy(run: Run) -> Found | None:
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
    when=f"one value, not full marks, for {the_last('completions', DEAD_COMPLETIONS, DEAD_GENERATIONS)}, and the same "
    "at the beginning",
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
        if value is None or value != _only_value(first, reward) or value == reward.full_marks:
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


@rule(
    "dominant-reward",
    "Other rewards drown correctness",
    when=f"other rewards make more than {DOMINANT_SHARE:.0%} of the advantage over "
    f"{the_last('groups', DOMINANT_GROUPS, DOMINANT_GENERATIONS)}, while correctness differs within at least "
    f"{DOMINANT_SPREAD:.0%} of groups and less than {DOMINANT_RIGHT:.0%} of completions are right",
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
    if sum(shares.values()) <= DOMINANT_SHARE:
        return None
    name = max(shares, key=lambda name: shares[name])
    return Found(
        f"Over the last {window.groups} groups rewards for other things make {sum(shares.values()):.0%} of the "
        f"advantage, {name} alone {shares[name]:.0%}, while {right:.0%} of completions are right and correctness "
        f"differs within {spread:.0%} of groups.",
        window.step,
    )
