"""An extension layer on TRL's `GRPOTrainer`. Importing this package imports no torch; its parts are imported by name.

- [`trl_grpo_ext.rewards`]: reward functions and bundles, usable in any TRL pipeline;
- [`trl_grpo_ext.tasks`]: GSM8K, and word problems made from a seed;
- [`trl_grpo_ext.evaluation`]: strict, flexible and sampled accuracy;
- [`trl_grpo_ext.embedded_policy`]: a tiny policy for runs without a hub.
"""

__version__ = "0.1.0"
