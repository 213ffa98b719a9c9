"""The rewards in TRL's own trainer and in TRL's own command line."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from canned import short_run_config
from datasets import Dataset
from tiny import save_tiny_policy, save_tiny_reward_model, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel
from trl import GRPOTrainer

from trl_grpo_ext.rewards import RewardBundle, exact_correctness_reward_func, gsm8k_bundle
from trl_grpo_ext.tasks import load_arithmetic


def config(output_dir, **options):
    return short_run_config(output_dir, max_steps=2, **options)


def train(bundle, args):
    trainer = GRPOTrainer(
        model=tiny_model(),
        reward_funcs=bundle,
        args=args,
        train_dataset=load_arithmetic("train", 8),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    return trainer


def test_bundle_in_grpo_trainer(tmp_path):
    bundle = gsm8k_bundle().with_weights(correctness_reward_func=4.0, int_reward_func=0.0)
    before = copy.deepcopy(bundle)
    trainer = train(bundle, config(tmp_path, reward_weights=bundle.weights))
    assert trainer.reward_func_names == bundle.names
    assert trainer.reward_weights.tolist() == [1.0, 1.0, 1.0, 0.0, 4.0]
    assert bundle == before
    assert list(bundle) == list(before)
    logs = trainer.state.log_history[0]
    for name in bundle.names:
        assert f"rewards/{name}/mean" in logs
    assert logs["accuracy"] == 0.0  # the reward's own metric, through TRL's `log_metric`


def test_two_answer_rewards_log_side_by_side(tmp_path):
    """TRL writes the completions with their extracted answers as a table, which needs columns of one length."""
    trainer = train(gsm8k_bundle() + [exact_correctness_reward_func], config(tmp_path, log_completions=True))
    assert "exact_correctness/accuracy" in trainer.state.log_history[0]
    (table, *_) = sorted((tmp_path / "completions").glob("*.parquet"))
    columns = Dataset.from_parquet(str(table), cache_dir=str(tmp_path / "cache")).column_names
    assert {"extracted_answer", "exact_correctness/extracted_answer"} <= set(columns)


def test_bundle_with_a_reward_model(tmp_path):
    """TRL loads the reward model and puts it into the list it was given; the bundle's own record stays."""
    folder = save_tiny_reward_model(tmp_path / "reward-model")
    without_model = gsm8k_bundle()
    bundle = without_model + [folder]
    assert bundle.weights == [1.0] * 6
    trainer = train(bundle, config(tmp_path / "out", reward_weights=bundle.weights))
    assert trainer.reward_func_names[-1] == "reward-model"
    assert "rewards/reward-model/mean" in trainer.state.log_history[0]
    assert without_model == gsm8k_bundle()
    assert bundle.names[-1] == "reward-model"
    assert isinstance(trainer.reward_funcs[-1], PreTrainedModel)
    assert bundle.copy()[-1] == folder
    assert bundle.select("reward-model")[0] == folder
    assert (bundle + []).names == bundle.names
    assert isinstance(bundle.copy(), RewardBundle)


@pytest.mark.slow
def test_trl_command_line(tmp_path):
    model = save_tiny_policy(tmp_path / "model")
    rows = load_arithmetic("train", 8)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows)
    )
    options = {
        "model_name_or_path": model,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    rewards = ["--reward_funcs", "trl_grpo_ext.rewards.correctness_reward_func"]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("trl")), "grpo", *rewards, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "rewards/correctness_reward_func/mean" in result.stdout + result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


async def judged(completions, **columns):
    """Fails on every other completion of those that come alone, and so on every batch."""
    if any(len(completion[0]["content"]) % 2 for completion in completions):
        raise ConnectionError("the judge is away")
    return [1.0] * len(completions)


def test_guarded_functions_in_grpo_trainer(tmp_path):
    """What fails is left out, of a plain and of an asynchronous function, and the run goes on."""

    def failing(completions, **columns):
        raise ValueError("nonsense")

    rewards = RewardBundle([failing, judged], guard={"max_failure_rate": None}) + gsm8k_bundle()
    logs = train(rewards, config(tmp_path)).state.log_history[0]
    assert logs["rewards/failing/mean"] != logs["rewards/failing/mean"] or logs["rewards/failing/mean"] is None
    assert 0 < logs["rewards/unscored"] <= 1
    assert logs["rewards/correctness_reward_func/mean"] == 0.0
