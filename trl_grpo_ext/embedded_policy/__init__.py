"""A tiny causal language model that ships with the package, for runs without a hub and without a GPU.

It solves the word problems of [`trl_grpo_ext.tasks.arithmetic`] well enough to be rewarded sometimes and badly enough
to learn. `scripts/build_tiny_policy.py` makes it. It is an ordinary checkpoint: pass its folder to `from_pretrained`.
"""

from pathlib import Path


# What recipes and configuration files call it.
EMBEDDED_POLICY = "embedded"


def embedded_policy_path() -> str:
    """The folder with the embedded policy and its tokenizer."""
    return str(Path(__file__).resolve().parent)
