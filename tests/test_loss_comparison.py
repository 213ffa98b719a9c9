"""TRL's loss against the one that takes its place, before it does."""

import pytest
import torch
from canned import canned_config, train_canned
from tiny import save_tiny_policy
from trl import GRPOTrainer

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, compat
from trl_grpo_ext.loss_comparison import differ, made_up_micro_batch


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def gradients(monkeypatch):
    """What is done to TRL's gradient, and how often it was asked for."""
    asked = []
    of_trl = compat.gradient_of_trls_loss

    def change_by(change):
        def gradient(trainer, rows, logps):
            asked.append(trainer)
            return change(of_trl(trainer, rows, logps), rows)

        monkeypatch.setattr(compat, "gradient_of_trls_loss", gradient)

    change_by(lambda gradient, rows: gradient)
    return change_by, asked


def train(policy, folder, **options):
    return train_canned(GRPOExtTrainer, canned_config(folder, GRPOExtConfig, num_iterations=2, **options), policy)


def test_it_is_asked_for_once_and_leaves_no_trace(policy, tmp_path, gradients):
    _, asked = gradients
    found = train(policy, tmp_path / "compared", max_steps=4)
    assert len(asked) == 1
    assert found.trainer.fast_paths["rows_left_out"] == "on"
    trainer = found.trainer
    before = {name: list(values) for name, values in trainer._metrics["train"].items()}
    was_training = trainer.model.training
    rows, logps = made_up_micro_batch(trainer.accelerator.device)
    compat.gradient_of_trls_loss(trainer, rows, logps)
    assert {name: list(values) for name, values in trainer._metrics["train"].items()} == before
    assert trainer.model.training == was_training
    assert compat.FORWARD not in vars(trainer)


def test_a_loss_with_another_gradient_is_trls(policy, tmp_path, gradients, caplog):
    change_by, _ = gradients
    change_by(lambda gradient, rows: 1.01 * gradient)
    found = train(policy, tmp_path / "ours", max_steps=4)
    assert "whose gradient is another one" in caplog.text
    assert "whose gradient is another one" in found.trainer.fast_paths["rows_left_out"]
    args = canned_config(tmp_path / "trl", num_iterations=2, max_steps=4)
    expected = train_canned(GRPOTrainer, args, policy)
    assert found.exact_grad_norms == pytest.approx(expected.exact_grad_norms, rel=1e-5)


def test_a_loss_that_counts_padding_is_refused_before_anything_is_generated(policy, tmp_path, gradients):
    change_by, _ = gradients
    change_by(lambda gradient, rows: gradient + (rows["completion_mask"] == 0))
    with pytest.raises(ValueError, match="gives padding a gradient") as caught:
        train(policy, tmp_path, max_steps=4)
    assert "_generate" not in {frame.name for frame in caught.traceback}


@pytest.mark.parametrize(
    ("change", "is_another"), [(1.0, False), (1 + 1e-6, False), (1.001, True), (float("nan"), True)]
)
def test_differ(change, is_another):
    gradient = torch.tensor([[1.0, -2.0]])
    assert differ(change * gradient, gradient) == is_another
