"""The doctor's rules, in the order in which they are reported: what comes first explains most of what follows.

Each is a function over a run, with its name and what there is to say, and with its limits above it, which
the check and the text share:

- [`trl_grpo_ext.report.rules.signals`]: whether there is anything to learn from;
- [`trl_grpo_ext.report.rules.policy`]: whether the policy learns, and does not run away;
- [`trl_grpo_ext.report.rules.speed`]: what costs time.
"""

from ..findings import Rule
from . import policy, signals, speed


RULES: tuple[Rule, ...] = (
    signals.truncated_completions,
    signals.unscored_references,
    signals.reward_not_finite,
    signals.reward_without_scores,
    signals.no_format,
    signals.never_right,
    signals.groups_unscored,
    signals.groups_without_format,
    signals.groups_all_wrong,
    signals.groups_all_right,
    signals.groups_all_equal,
    signals.constant_reward,
    signals.dominant_reward,
    policy.learning_rate_zero,
    policy.learning_rate_too_high,
    policy.no_gradient,
    policy.kl_to_reference,
    policy.old_rollouts,
    policy.kl_of_passes,
    policy.clip_binds_mostly,
    policy.sampler_disagrees,
    policy.entropy_collapse,
    policy.format_without_correctness,
    policy.length_without_correctness,
    speed.slow_rewards,
    speed.waiting_ranks,
    signals.data_too_easy,
    policy.nothing_changes,
    policy.clip_never_binds,
    policy.learning_rate_small,
    speed.gpu_waits,
    speed.slow_generation,
)
