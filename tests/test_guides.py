"""What the guides show can be run, and runs; `guides.py` says how a page is written for that."""

import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import trl.trainer.grpo_trainer
from canned import ROWS, canned_config, canned_prompts, short_run_config, train_canned
from guides import (
    GUIDES,
    Block,
    blocks_of,
    commands_of,
    hub_of_made_up_data,
    hub_of_tiny_models,
    in_a_folder,
    look_at_command,
    look_at_python,
    run_page,
    small_runs,
)
from launch import ROOT

from trl_grpo_ext import EvaluationCallback, GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.rewards import gsm8k_bundle
from trl_grpo_ext.tasks import load_arithmetic
from trl_grpo_ext.trackers import finish_trackers


PAGES = sorted(GUIDES.glob("*.md"))
# Pages whose blocks are parts of scripts, which stand in a text that explains them: looked at, not run.
OF_PARTS = ("development", "doctor", "evaluation", "launch", "passes", "rewards", "runs", "update", "vllm")
WHOLE = [page for page in PAGES if page.stem not in OF_PARTS]

NEEDED = {"tracking": ("tensorboard", "wandb")}  # packages that nothing else needs

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@each_page
def test_what_a_page_shows_can_be_had(page, tmp_path):
    """Each block compiles or parses: names that are imported, settings, options, scripts and files are there."""
    blocks = blocks_of(page)
    with in_a_folder(tmp_path):
        for block in blocks:
            if block.file is not None:
                (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / block.file).write_text(block.text)
        for block in blocks:
            if block.language == "python":
                look_at_python(block)
            elif block.language == "bash":
                for words in commands_of(block.text):
                    try:
                        look_at_command(words)
                    except (SystemExit, Exception) as error:
                        raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with hub_of_tiny_models(tmp_path_factory.mktemp("models")), hub_of_made_up_data():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize("page", WHOLE, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path):
    for package in NEEDED.get(page.stem, ()):
        pytest.importorskip(package)
    with in_a_folder(tmp_path), small_runs(), patch.dict(os.environ):  # what a page sets is put back
        try:
            run_page(page)
        finally:
            finish_trackers(0, 60)
        if page.stem == "tracking":
            check_trackers(tmp_path)


def check_trackers(folder):
    """What the page on tracking says: which name stands where, in each tracker."""
    from read_wandb import logged_to_wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (folder / "outputs" / "run" / "runs").glob("*")
    accumulator = EventAccumulator(str(events)).Reload()
    of_tensorboard = set(accumulator.Tags()["scalars"])
    of_wandb = {name for row in logged_to_wandb(folder) for name in row}
    for names in (of_tensorboard, of_wandb):
        assert {"train/reward", "train/iteration/2/approx_kl", "eval/strict", "eval/answer", "eval/pass@4"} <= names
    assert list((folder / "outputs" / "run" / "completions").glob("*.parquet"))


def test_what_is_wrong_is_found(tmp_path):
    """The tests above can fail."""

    def block(text):
        return Block(tmp_path / "page.md", 1, "python", text)

    look_at_python(block("args = GRPOExtConfig(num_iterations=4, ...)"))
    with pytest.raises(AssertionError, match=r"has no num_iteration$"):
        look_at_python(block("args = GRPOExtConfig(num_iteration=4)"))
    with pytest.raises(SyntaxError):
        look_at_python(block("args = ("))
    with pytest.raises(ImportError):
        look_at_python(block("from trl_grpo_ext.rewards import tag_bundel"))
    for good, bad in (
        ("accelerate launch recipes/gsm8k.py --max_steps 3", "accelerate launch recipes/gsm8k.py --max_step 3"),
        ("trl-grpo-ext audit a.csv --bundle tag", "trl-grpo-ext audit a.csv --bundel tag"),
        ("trl-grpo-ext grpo --max_steps 3 --num_processes 2", "trl-grpo-ext grpo --max_steps 3 --num_proc 2"),
        ("sbatch --nodes 2 scripts/slurm/train.sbatch --max_steps 3", "sbatch --nodes 2 scripts/slurm/trian.sbatch"),
        ("python scripts/plan_memory.py", "python scripts/plan.py"),
        ("FOO=1 pip install trl_grpo_ext", "pipp install trl_grpo_ext"),
    ):
        (words,) = commands_of(good)
        look_at_command(words)
        (words,) = commands_of(bad)
        with pytest.raises((AssertionError, SystemExit)):
            look_at_command(words)


# Metrics

# Rows of the table that the runs below do not have, and why.
OF_OTHER_RUNS = {
    "aux_loss": "a mixture of experts; TRL computes it",
    "gpu/utilization": "an NVIDIA GPU",
    "rewards/unscored": "a guarded function, or answers as mathematics: `test_trl.py`, `test_rewards_symbolic.py`",
    "tools/call_frequency": "tools: `test_generation_backends.py`, and the page on reward functions",
    "tools/failure_frequency": "tools",
    **{
        f"update/{name}": "several processes: `test_balanced_ranks.py`"
        for name in ("slowest_rank", "slowest_rank_unbalanced", "rows_moved", "exchange_s", "exchange_mb")
    },
    "{name}/accuracy": "a second answer reward: `test_trl.py`",
}


def rows_of_metrics():
    table = re.findall(r"^\| `([^`]+)` \|", (GUIDES / "metrics.md").read_text(), re.M)
    assert len(table) == len(set(table))
    return table


def pattern_of(row):
    return re.escape(row).replace(r"\{name\}", r"[^/]+").replace(r"\{k\}", r"\d+")


def test_metrics_by_name_in_the_sources_are_in_the_table():
    """Those that TRL's trainer and this package collect, whatever it takes to see them."""
    sources = [Path(trl.trainer.grpo_trainer.__file__), *(ROOT / "trl_grpo_ext").rglob("*.py")]
    collected = r'(?:_metrics\[(?:mode|"train")\]\[|append_metric\(\s*self(?:\._?trainer)?,\s*)f?"([^"]+)"'
    found = {name for source in sources for name in re.findall(collected, source.read_text())}
    assert {"reward", "rollouts/iterations_used", "rewards/{reward_func_name}/mean"} <= found
    patterns = [re.compile(pattern_of(row)) for row in rows_of_metrics()]
    for name in found:
        example = re.sub(r"\{.*?\}", "7", name)
        assert any(pattern.fullmatch(example) for pattern in patterns), f"{name} is not in metrics.md"


@pytest.fixture(scope="module")
def logged(policy, tmp_path_factory):
    """The names that training runs have logged, of several kinds."""
    folder = tmp_path_factory.mktemp("metrics")
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": ROWS}
    sampler = {"use_vllm": True, "vllm_importance_sampling_mode": "sequence_mask"}
    names = set()
    for settings, options in (
        ({"num_iterations": 2, "beta": 0.04, **evaluated}, {"eval_dataset": canned_prompts(num_prompts=2)}),
        ({"num_iterations": 2, **sampler}, {"sampler_noise": 0.5}),
        ({"loss_type": "cispo", "max_steps": 1}, {}),
        ({"loss_type": "vespo", "max_steps": 1}, {}),
        ({"entropy_coef": 0.01, "max_steps": 1}, {}),
    ):
        args = canned_config(folder / "run", GRPOExtConfig, **{"max_steps": 2, **settings})
        run = train_canned(GRPOExtTrainer, args, policy, **options)
        names |= {name for entry in run.log for name in entry}
    problems = load_arithmetic("train", 8)
    args = short_run_config(folder / "bundle", GRPOExtConfig)
    trainer = GRPOExtTrainer(embedded_policy_path(), gsm8k_bundle(), args, problems)
    trainer.add_callback(EvaluationCallback(trainer, problems.select(range(2)), samples_per_item=2))
    trainer.train()
    names |= {name for entry in trainer.state.log_history for name in entry}
    return names


@pytest.mark.slow
def test_each_metric_is_in_the_table(logged):
    rows = rows_of_metrics()
    patterns = [re.compile(pattern_of(row)) for row in rows]
    unknown = {
        name
        for name in logged
        if not any(pattern.fullmatch(form) for pattern in patterns for form in (name, name.removeprefix("eval_")))
    }
    assert not unknown


@pytest.mark.slow
def test_no_row_of_the_table_is_dead(logged):
    dead = {row for row in rows_of_metrics() if not any(re.fullmatch(pattern_of(row), name) for name in logged)}
    assert dead == OF_OTHER_RUNS.keys() & dead
