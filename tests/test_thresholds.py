"""Where one thing ends and another begins: at the threshold, and one step beside it."""

import shutil

import pytest
import torch
from canned import NUM_GENERATIONS, canned_config, train_canned
from test_shared_prefix import SHAPE, by_row, make_model, make_rows, make_trainer, scores
from transformers import Gemma3TextConfig, MistralConfig

from trl_grpo_ext import checkpoints
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.trainer import GRPOExtTrainer


# KL stop


def rewards_that_differ(prompts, **kwargs):
    """Each completion of a group gets another one, so that each has a gradient."""
    return [float(position % NUM_GENERATIONS) for position in range(len(prompts))]


def three_passes(policy, output_dir, **options):
    """One pass is one optimizer step, of micro-batches with different numbers of tokens."""
    schedule = {"num_iterations": 3, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 3}
    args = canned_config(output_dir, GRPOExtConfig, **schedule, **options)
    return train_canned(GRPOExtTrainer, args, policy, kinds=("live",), reward=rewards_that_differ)


def test_passes_end_above_the_target_and_not_below(policy, tmp_path):
    """`target_kl` is compared with the mean over the pass's tokens, which is the figure that is reported."""
    (kl,) = three_passes(policy, tmp_path / "free").metric("iteration/2/approx_kl")
    below = three_passes(policy, tmp_path / "below", target_kl=0.98 * kl)
    assert below.metric("rollouts/iterations_used")[0] == 2.0
    assert below.trainer.rollout_func.num_calls == 2
    above = three_passes(policy, tmp_path / "above", target_kl=1.02 * kl)
    assert above.metric("rollouts/iterations_used") == [3.0]
    assert above.trainer.rollout_func.num_calls == 1


# Sliding windows. A window of as many tokens as the longest row hides nothing, and one of a token less its first one.

LONGEST = 90 + 70 - 1  # of `make_rows`: a completion's last token predicts nothing that is asked for


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MistralConfig(**SHAPE), id="all layers"),
        pytest.param(
            Gemma3TextConfig(**SHAPE, head_dim=8, layer_types=["sliding_attention", "full_attention"]), id="one"
        ),
    ],
)
def test_a_sliding_window_as_long_as_the_longest_row(config, tmp_path):
    rows = make_rows()
    for window, fits in ((LONGEST, True), (LONGEST - 1, False)):
        config.sliding_window = window
        expected, _ = by_row(make_model(config), *rows)
        trainer = make_trainer(make_model(config), tmp_path, shared_prefix="auto")
        shapes = []
        trainer.model.register_forward_pre_hook(
            lambda module, positional, named, shapes=shapes: shapes.append(len(named["input_ids"])), with_kwargs=True
        )
        assert trainer.packs
        shapes.clear()
        found, _ = scores(trainer, *rows)
        assert shapes == [1 if fits else len(rows[0])]  # packed into one row, or as they are
        torch.testing.assert_close(found, expected)
        # what is asked before rows are arranged by prompt: of rows padded to so many tokens
        assert trainer.packs_rows_of(window)
        assert not trainer.packs_rows_of(window + 2)


# Checkpoints that not every node has


def test_the_newest_checkpoint_that_every_node_has(policy, tmp_path, monkeypatch):
    def train(output_dir, **options):
        args = canned_config(output_dir, GRPOExtConfig, save_strategy="steps", save_steps=1)
        return train_canned(GRPOExtTrainer, args, policy, **options)

    train(tmp_path / "node")
    monkeypatch.setattr(checkpoints, "gather_object", lambda found: [*found, [1, 2, 7]])  # another node has others
    assert len(train(shutil.copytree(tmp_path / "node", tmp_path / "resumed"), resume=True).exact_grad_norms) == 2
    monkeypatch.setattr(checkpoints, "gather_object", lambda found: [*found, [7]])
    with pytest.raises(checkpoints.CheckpointError, match="no whole checkpoint"):
        train(tmp_path / "node", resume=True)
