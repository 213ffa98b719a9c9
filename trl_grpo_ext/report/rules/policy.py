"""Does the policy learn, and not run away? Imports no torch."""

from ..findings import HINT, Found, rule
from ..record import Run
from ..windows import Window, apart, both_windows, earliest, fall, first_window, last_window, latest, mean, median
from .common import number_of, setting


# Something else rises, and correctness does not.
FLAT_STEPS = 40
FLAT_GROUPS = 64
FLAT_GENERATIONS = 4
FLAT_RISE = 0.03
FORMAT_RISE = 0.2
LENGTH_RATIO = 1.5
LENGTH_TOKENS = 16
# Sooner, and of fewer groups, where fewer are right than at the beginning.
FALL_STEPS = 20
FALL_GROUPS = 32


def _flat_windows(
    run: Run, steps: int = FLAT_STEPS, groups: int = FLAT_GROUPS, rise: float = FLAT_RISE
) -> tuple[Window, Window] | None:
    """The beginning and now, if correctness has not risen between them by more than there is noise."""
    windows = both_windows(run, steps_between=steps, groups=groups, generations=FLAT_GENERATIONS)
    before, now = (window.mean("right") for window in windows) if windows else (None, None)
    return windows if before is not None and now is not None and now - before < rise else None


@rule(
    "format-without-correctness",
    "The format is learned, and correctness is not",
    when=f"after {FLAT_STEPS} steps or more, format rewards pay {FORMAT_RISE:.0%} of full marks more than over the "
    f"first {FLAT_GROUPS} groups, and right completions have not become more by {FLAT_RISE:.0%}",
    remedy="Raise the weight of correctness, and see in the report whether right answers are graded as right. If they "
    "are, take easier problems or more completions of each.",
    explained_by=("unscored-references", "never-right", "dominant-reward"),
)
def format_without_correctness(run: Run) -> Found | None:
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


@rule(
    "length-without-correctness",
    "Completions grow longer, and correctness does not",
    when=f"after {FLAT_STEPS} steps or more, they are {LENGTH_RATIO:g} times and {LENGTH_TOKENS} tokens longer than "
    f"the first, and right completions have not become more by {FLAT_RISE:.0%}; after {FALL_STEPS}, have become fewer",
    remedy="Look at late completions: repetition, or a reward that pays for length. loss_type='dapo' or 'dr_grpo' "
    "does not favour long wrong completions, and a reward for brevity holds them back.",
    explained_by=("truncated-completions",),
)
def length_without_correctness(run: Run) -> Found | None:
    windows = _flat_windows(run) or _flat_windows(run, FALL_STEPS, FALL_GROUPS, rise=0.0)
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


# The policy gets worse than it was. Completions of a prompt are alike, so shares of few groups go up and down by
# themselves: few are enough only where the policy is seen to move far.
WORSE_GROUPS = ((32, 32), (64, 64))  # first ones, last ones
WORSE_GROUPS_AFAR = ((8, 16), (16, 16))
WORSE_PASSES = 3
WORSE_ERRORS = 3.0
WORSE_ERRORS_AFAR = 2.5
WORSE_ALIKE = 0.5
WORSE_RIGHT_RATIO = 0.5
WORSE_RIGHT = 0.1
WORSE_FORMAT = 0.3
KL_PASSES = 0.025


@rule(
    "learning-rate-too-high",
    "The policy is worse than it was at the beginning",
    when=f"over {WORSE_GROUPS[0][1]} or {WORSE_GROUPS[-1][1]} groups, right completions are at most "
    f"{WORSE_RIGHT_RATIO:.0%} of what they were over the first ones and {WORSE_RIGHT:.0%} of completions fewer, or "
    f"the format is {WORSE_FORMAT:.0%} of full marks lower, by {WORSE_ERRORS:g} standard errors; over "
    f"{WORSE_GROUPS_AFAR[0][1]} where passes move the policy by more than {KL_PASSES:g} nats a token",
    remedy="Go back to a checkpoint or the start with a learning_rate three to ten times smaller; fewer passes "
    "(num_iterations), target_kl or max_grad_norm help too. See what the rewards pay for, if it is not that.",
    explained_by=("length-without-correctness",),
)
def learning_rate_too_high(run: Run) -> Found | None:
    farthest = _farthest_pass(run, "approx_kl", WORSE_PASSES)
    is_afar = farthest is not None and farthest[1] > KL_PASSES
    sizes = [(groups, WORSE_ERRORS_AFAR) for groups in WORSE_GROUPS_AFAR if is_afar]
    for (first, last), errors in [*sizes, *((groups, WORSE_ERRORS) for groups in WORSE_GROUPS)]:
        windows = apart(run, first_window(run, groups=first), last_window(run, groups=last, generations=2))
        if windows is None:
            return None
        if fell := _what_fell(windows, errors):
            return Found(
                f"From the first {windows[0].completions} to the last {windows[1].completions} completions "
                f"{' and '.join(fell)}, with learning_rate={setting(run, 'learning_rate')}.",
                windows[1].step,
            )
    return None


def _what_fell(windows: tuple[Window, Window], least_errors: float) -> list[str]:
    said = []
    before, now, errors = fall(windows, "right", WORSE_ALIKE) or (0.0, 0.0, 0.0)
    if errors >= least_errors and now <= WORSE_RIGHT_RATIO * before and before - now >= WORSE_RIGHT:
        said.append(f"right completions fell from {before:.0%} to {now:.0%}")
    before, now, errors = fall(windows, "formatted", WORSE_ALIKE) or (0.0, 0.0, 0.0)
    if errors >= least_errors and before - now >= WORSE_FORMAT:
        said.append(f"the format fell from {before:.0%} to {now:.0%} of full marks")
    return said


# A learning rate of nothing.
ZERO_LOGS = 3
SMALL_RATE = 1e-8
SMALL_RATE_STEPS = 10


@rule(
    "learning-rate-zero",
    "The learning rate is 0",
    when=f"{ZERO_LOGS} logs in a row",
    remedy="Set learning_rate, or a schedule (max_steps, lr_scheduler_type) that has not come to its end.",
)
def learning_rate_zero(run: Run) -> Found | None:
    # A schedule may begin at 0, and end there: both are single steps.
    values = latest(run, "learning_rate", ZERO_LOGS)
    if not values or any(value != 0 for _, value in values):
        return None
    settings = f"learning_rate={setting(run, 'learning_rate')}, lr_scheduler_type={setting(run, 'lr_scheduler_type')}"
    return Found(f"It was 0 at steps {values[0][0]} to {values[-1][0]} ({settings}).", values[0][0])


@rule(
    "learning-rate-small",
    "The learning rate is next to nothing",
    when=f"learning_rate is below {SMALL_RATE:g}",
    remedy="1e-6 is usual for whole models, 1e-5 for adapters.",
    severity=HINT,
)
def learning_rate_small(run: Run) -> Found | None:
    rate = run.settings.get("learning_rate")
    if not isinstance(rate, int | float) or not 0 < rate < SMALL_RATE or run.last_step < SMALL_RATE_STEPS:
        return None
    return Found(f"learning_rate={rate:g}, after {run.last_step} steps.", 1)


# No gradient. The loss alone says nothing: on the first pass it is 0 where the gradient is not.
NO_GRADIENT_LOGS = 5
NO_GRADIENT_GENERATIONS = 2


@rule(
    "no-gradient",
    "The gradient is 0",
    when=f"its norm is 0 in {NO_GRADIENT_LOGS} logs in a row, while rewards differ within groups (a loss of 0 alone "
    "is no sign of it)",
    remedy="See that parameters are trained at all (adapters, frozen layers), and that completions that carry an "
    "advantage are not all masked out.",
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
)
def no_gradient(run: Run) -> Found | None:
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
ENTROPY_GROUPS = 16
ENTROPY_GENERATIONS = 2
KL_REFERENCE = 0.5
KL_VALUES = 8
PASSES = 5
MOST_PASSES = 64


@rule(
    "entropy-collapse",
    "Entropy has collapsed before anything was learned",
    when=f"the median of the last {ENTROPY_VALUES} values is below {ENTROPY_RATIO:.0%} of that of the first, and less "
    f"than {ENTROPY_RIGHT:.0%} of completions are right",
    remedy="Completions of a prompt become all the same: raise temperature or epsilon_high, or lower learning_rate.",
    explained_by=("learning-rate-too-high",),
)
def entropy_collapse(run: Run) -> Found | None:
    before, now = earliest(run, "entropy", ENTROPY_VALUES), latest(run, "entropy", ENTROPY_VALUES)
    window = last_window(run, groups=ENTROPY_GROUPS, generations=ENTROPY_GENERATIONS)
    right = window.mean("right") if window else None
    if not before or not now or window is None or (right is not None and right >= ENTROPY_RIGHT):
        return None
    if median(now) >= ENTROPY_RATIO * median(before):
        return None
    learned = "" if right is None else f", and {right:.0%} of completions are right"
    return Found(f"Entropy went from {median(before):.3g} to {median(now):.3g} nats a token{learned}.", now[0][0])


@rule(
    "kl-to-reference",
    "The policy runs away from the reference",
    when=f"the median of the last {KL_VALUES} values of `kl` is above {KL_REFERENCE:g} nats a token",
    remedy="Lower learning_rate, or raise beta, which holds the policy back.",
)
def kl_to_reference(run: Run) -> Found | None:
    values = latest(run, "kl", KL_VALUES)
    if not values or median(values) <= KL_REFERENCE:
        return None
    return Found(
        f"It was {median(values):.2g} nats a token over the last {KL_VALUES} values, with beta="
        f"{setting(run, 'beta')}.",
        values[0][0],
    )


@rule(
    "kl-of-passes",
    "The policy moves too far within the passes over a batch of rollouts",
    when=f"the median of {PASSES} passes' KL to the policy that sampled is above {KL_PASSES:g} nats a token, and "
    "above target_kl",
    remedy="Set target_kl (0.01 to 0.02), or lower learning_rate or num_iterations.",
    explained_by=("old-rollouts",),
)
def kl_of_passes(run: Run) -> Found | None:
    found = _farthest_pass(run, "approx_kl")
    target = run.settings.get("target_kl")
    asked_for = target if isinstance(target, int | float) else 0.0
    if found is None or found[1] <= max(KL_PASSES, asked_for):
        return None
    number, value, step = found
    return Found(
        f"In pass {number} over a batch of rollouts the policy was {value:.2g} nats a token from the one that sampled "
        f"(median of {PASSES} passes), with learning_rate={setting(run, 'learning_rate')} and "
        f"num_iterations={setting(run, 'num_iterations')}.",
        step,
    )


def _farthest_pass(run: Run, name: str, count: int = PASSES) -> tuple[int, float, int] | None:
    """The pass in which a metric is largest in the median: its number, that median, and since when."""
    found = []
    for number in range(1, min(number_of(run, "num_iterations", 1), MOST_PASSES) + 1):
        values = latest(run, f"iteration/{number}/{name}", count)
        if values:
            found.append((number, median(values), values[0][0]))
    return max(found, key=lambda item: item[1], default=None)


# The clip.
CLIP_NEVER = 1e-5
CLIP_NEVER_PASSES = 10
CLIP_MOST = 0.5


@rule(
    "clip-never-binds",
    "The passes after the first change next to nothing",
    when=f"with num_iterations > 1 the clip binds for {CLIP_NEVER:g} of tokens or less over {CLIP_NEVER_PASSES} of "
    "the last passes, while the learning rate is at least half of what is set",
    remedy="A higher learning_rate, or more passes, would use the same rollouts better; or save the time with fewer.",
    severity=HINT,
    explained_by=("learning-rate-zero", "learning-rate-small", "no-gradient"),
)
def clip_never_binds(run: Run) -> Found | None:
    passes = number_of(run, "num_iterations", 1)
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


@rule(
    "clip-binds-mostly",
    "The clip binds for most tokens",
    when=f"the median of {PASSES} passes' clip_ratio is above {CLIP_MOST:.0%}",
    remedy="Most of the gradient is cut away: lower learning_rate or num_iterations, or set target_kl.",
    explained_by=("old-rollouts",),
)
def clip_binds_mostly(run: Run) -> Found | None:
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


@rule(
    "sampler-disagrees",
    "Sampler and trainer disagree",
    when=f"in the median of {SAMPLER_VALUES} generations the mean importance weight is below {SAMPLER_RATIO:g} or "
    f"above {1 / SAMPLER_RATIO:.2g}, or log-probabilities differ by more than {SAMPLER_LOGP:g} nats a token, or "
    f"by more than {SAMPLER_GROWN_LOGP:g} and {SAMPLER_GROWTH:g} times as much as at the beginning",
    remedy="See that vLLM has the trainer's weights, precision (dtype, quantization, KV cache) and sampling settings, "
    "and leave vllm_importance_sampling_correction on.",
)
def sampler_disagrees(run: Run) -> Found | None:
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


@rule(
    "old-rollouts",
    "Rollouts are too old when they are used",
    when=f"they are used for {OLD_STEPS} optimizer steps or more, and in the median of {PASSES} passes KL to the "
    f"policy that sampled is above {OLD_KL:g} nats a token or the clip binds for more than "
    f"{OLD_CLIP:.0%} of tokens",
    remedy="Lower steps_per_generation or num_iterations, raise gradient_accumulation_steps, or set target_kl, which "
    "ends the passes in time.",
)
def old_rollouts(run: Run) -> Found | None:
    accumulation = max(1, number_of(run, "gradient_accumulation_steps", 1))
    steps = number_of(run, "num_iterations", 1) * number_of(run, "steps_per_generation", accumulation) // accumulation
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
