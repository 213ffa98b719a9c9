"""What people see of a training: completions, a notebook's table, trackers' names, the model card."""

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
from canned import short_run_config
from datasets import Dataset
from tiny import save_tiny_policy, tiny_tokenizer
from trl import GRPOTrainer
from trl.trainer.utils import print_prompt_completions_sample

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, MultiIterationMixin
from trl_grpo_ext.legible import name_base_model, show_completions
from trl_grpo_ext.rewards import gsm8k_bundle
from trl_grpo_ext.trackers import DescribeRun


WIDTH = 100


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def problems():
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": "2 + 2 x 6?"}]] * 4, "answer": ["14159"] * 4})


def make_trainer(policy, folder, trainer_class=GRPOExtTrainer, reward_funcs=None, **options):
    return trainer_class(
        model=policy,
        reward_funcs=gsm8k_bundle() if reward_funcs is None else reward_funcs,
        args=short_run_config(folder, GRPOExtConfig, **options),
        train_dataset=problems(),
        processing_class=tiny_tokenizer(),
    )


# Completions


def test_completions_are_shown_with_their_references(policy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    make_trainer(policy, tmp_path, log_completions=True).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "╭"))]
    shown = "\n".join(lines)
    assert "Step 1" in shown
    assert "reference" in shown
    num_tables = shown.count("Step 1")  # TRL shows them again with the last log
    assert shown.count("14159") == 4 * num_tables
    assert shown.count("correctness") == 4 * num_tables  # each score by name, in one column
    assert max(map(len, lines)) <= WIDTH


def shown(capsys, monkeypatch, **options):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    columns = {
        "prompts": [f"p{row}" for row in range(64)],
        "completions": [f"c{row}" for row in range(64)],
        "rewards": {"first": [0.5] * 64},
        "advantages": [row - 32.0 for row in range(64)],
        "extra": {"reference": ["7"] * 64, "nothing": [None] * 64},
        **options,
    }
    weights = {name: 2.0 if name == "b" else 1.0 for name in columns["rewards"]}
    show_completions(weights, print_prompt_completions_sample, step=3, **columns)
    return capsys.readouterr().out


def test_best_and_worst_of_a_large_batch(capsys, monkeypatch):
    table = shown(capsys, monkeypatch)
    assert all(f"c{row} " in table for row in (0, 1, 62, 63))
    assert "c5 " not in table
    assert "nothing" not in table
    assert shown(capsys, monkeypatch, num_samples=0) == ""
    assert shown(capsys, monkeypatch, num_samples=7).count(" p") == 7


def test_long_texts_are_cut(capsys, monkeypatch):
    table = shown(capsys, monkeypatch, completions=["x" * 100_000 + "the end"] * 64, prompts=["y" * 100_000] * 64)
    assert len(table) < 20_000
    assert "end" in table


def test_weighted_sum_where_there_are_many(capsys, monkeypatch):
    scores = {"a_reward_func": [1.0] * 64, "b": [0.25] * 64, "c": [float("nan")] * 64}
    table = shown(capsys, monkeypatch, rewards=scores)
    assert "1.50" in table
    assert "a 1" in table
    assert "a_reward_func" not in table


# Trackers


@pytest.mark.parametrize("trainer_class", [GRPOExtTrainer, type("Mine", (MultiIterationMixin, GRPOTrainer), {})])
def test_nothing_without_a_value_is_logged(policy, tmp_path, trainer_class):
    def unscored(completions, **kwargs):
        return [None] * len(completions)

    def scored(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = make_trainer(policy, tmp_path, trainer_class, [unscored, scored], eval_strategy="no")
    trainer.train()
    entries = trainer.state.log_history
    assert all(value is not None and value == value for entry in entries for value in entry.values())
    names = {name for entry in entries for name in entry}
    assert "rewards/scored/mean" in names
    assert "rewards/unscored/mean" not in names


class Config(dict):
    def update(self, values, allow_val_change):
        super().update(values)


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    found = SimpleNamespace(run=object(), config=Config())
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def test_trackers_know_run_rewards_and_data(policy, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "to be restored")
    monkeypatch.delenv("WANDB_PROJECT")
    trainer = make_trainer(policy, tmp_path / "my-run")
    trainer.args.report_to = ["wandb"]
    callback = DescribeRun(trainer, "sums")
    assert trainer.args.run_name == "my-run"
    assert trainer.args.project == "trl_grpo_ext"
    assert os.environ["WANDB_PROJECT"] == "trl_grpo_ext"
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert wandb.config["bundle"]["correctness_reward_func"] == 1.0
    assert wandb.config["dataset"] == {"name": "sums", "rows": 4}


def test_what_the_user_says_goes_first(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    trainer = make_trainer(policy, tmp_path, run_name="first try")
    DescribeRun(trainer)
    assert (trainer.args.run_name, trainer.args.project) == ("first try", "mine")


# Notebooks


@pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="notebooks need IPython")
def test_a_notebook_shows_rewards(policy, tmp_path, monkeypatch):
    from transformers import trainer as transformers_trainer
    from transformers.utils import notebook

    from trl_grpo_ext.notebook import NotebookProgress

    tables = []

    def keep(tracker):
        tables.append(tracker.inner_table)

    monkeypatch.setattr(transformers_trainer, "DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    monkeypatch.setattr(notebook.NotebookTrainingTracker, "display", keep)

    def accurate(completions, log_metric, **kwargs):
        log_metric("accuracy", 0.25)
        return [1.0] * len(completions)

    trainer = make_trainer(policy, tmp_path, reward_funcs=[accurate], max_steps=3, disable_tqdm=False)
    assert [type(item) for item in trainer.callback_handler.callbacks].count(NotebookProgress) == 1
    trainer.train()
    columns, *rows = tables[-1]
    assert columns == ["Step", "Training Loss", "Reward", "Accuracy"]
    assert [row[0] for row in rows] == [1, 2, 3]
    assert all(row[2:] == [1.0, 0.25] for row in rows)


# Model card


def test_the_model_card_names_its_base(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path)
    trainer.create_model_card(model_name="out")
    card = (tmp_path / "README.md").read_text()
    assert f"fine-tuned version of `{policy.rsplit('/', 1)[-1]}`" in card
    assert "None" not in card.split("## Training procedure")[0]
    assert policy not in card  # whose folder it was is nobody's business
    name_base_model(trainer)
    assert (tmp_path / "README.md").read_text() == card
