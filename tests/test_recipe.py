"""The recipe, run as a user runs it. What needs only its arguments parsed is called in this process."""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
from launch import launcher, load_script, run_to_the_end, warm_python
from safetensors.torch import load_file
from tiny import save_tiny_policy, tiny_tokenizer

from trl_grpo_ext import script
from trl_grpo_ext.checkpoints import checkpoints
from trl_grpo_ext.evaluation import CONVENTIONS, read_answers
from trl_grpo_ext.rewards.names import find_rewards
from trl_grpo_ext.runs import RUN_FILE, RunRecord, read_run


ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "gsm8k.py"
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def recipe():
    return load_script(RECIPE)


def run(*arguments, launcher=None, env=None, timeout=600):
    command = [*(launcher or warm_python()), str(RECIPE), *map(str, arguments)]
    # The recipe takes all cores, and another test computes meanwhile: spinning threads would take each other's time.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **(env or {})}
    return run_to_the_end(command, timeout, folder=None, environment=environment)


def small(output_dir, **options):
    """Arguments of a run that takes seconds."""
    options = {
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 48,
        "eval_items": 8,
        "eval_samples": 2,
        "train_items": 64,
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses(recipe, config, tmp_path):
    # `use_cpu`: without a GPU, transformers refuses the others' bfloat16
    recipe_args, training_args, model_args, settings = recipe.parse_arguments(
        ["--config", str(config), "--use_cpu", "true", "--output_dir", str(tmp_path)]
    )
    assert training_args.output_dir == str(tmp_path)
    assert model_args.model_name_or_path
    assert find_rewards(recipe_args.bundle)
    assert training_args.generation_batch_size % training_args.num_generations == 0
    assert training_args.beta == 0.0
    # as a run's record, it starts the same run
    RunRecord(settings).write(tmp_path)
    assert recipe.parse_arguments([f"--config={tmp_path / RUN_FILE}"])[2:] == (model_args, settings)


@pytest.mark.parametrize(
    "config", [config for config in CONFIGS if config.stem != "offline-tiny"], ids=lambda p: p.stem
)
def test_the_options_that_a_configuration_names_for_vllm(recipe, config, tmp_path):
    (options,) = re.findall(r"--use_vllm true[^(\n]*", config.read_text())
    others = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    training_args = recipe.parse_arguments(["--config", str(config), *options.split(), *others])[1]
    assert training_args.use_vllm
    assert training_args.vllm_mode == "colocate"
    assert training_args.vllm_max_model_length > 2 * training_args.max_completion_length


def test_the_default_configuration(recipe):
    recipe_args, training_args, model_args, _ = recipe.parse_arguments([])
    assert model_args.model_name_or_path == "embedded"
    assert recipe_args.dataset_name == "arithmetic"
    assert training_args.output_dir == "outputs/offline-tiny"
    assert training_args.use_cpu
    # what is on the command line goes before the file
    assert recipe.parse_arguments(["--learning_rate", "0.5"])[1].learning_rate == 0.5


def check_summary(output_dir, items=8, steps=2, samples=2):
    summary = json.loads((output_dir / "summary.json").read_text())
    for when in ("before", "after"):
        accuracy = summary["accuracy"][when]
        assert accuracy["items"] == items
        for key in (*CONVENTIONS, "format", f"mean@{samples}"):
            assert 0.0 <= accuracy[key]["low"] <= accuracy[key]["mean"] <= accuracy[key]["high"] <= 1.0
    assert summary["optimizer_steps"] == steps
    assert summary["seconds"] > 0
    assert set(summary["versions"]) >= {"torch", "trl", "transformers", "accelerate", "datasets", "peft", "python"}
    return summary


def test_a_small_run(tmp_path):
    result = run(*small(tmp_path / "out"), launcher=launcher("cpu.yaml", num_processes=1, is_warm=False))
    assert result.returncode == 0, result.stderr[-3000:]
    summary = check_summary(tmp_path / "out")
    assert summary["processes"] == 1
    assert summary["model"] == "embedded"
    assert summary["dataset"] == "arithmetic"
    assert summary["accuracy_heldout_templates"]["after"]["items"] == 8
    assert summary["accuracy"]["before"] != summary["accuracy"]["after"] or summary["optimizer_steps"] == 2
    # a table and not a wall of metrics, which are in a file
    assert "new numbers, known templates" in result.stdout
    assert "'rewards/" not in result.stdout
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("rewards/correctness_reward_func/mean" in entry for entry in history)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "Evaluating before" in result.stderr


@pytest.mark.slow
def test_gsm8k_from_a_file_with_held_out_rows(tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(24)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(
        *small(tmp_path / "out", dataset_name=file, eval_items=5, bundle="tag", reward_weights="2"), timeout=120
    )
    assert result.returncode == 2
    assert "--reward_weights: got 1 for 2 rewards" in result.stderr
    result = run(*small(tmp_path / "out", dataset_name=file, eval_items=5, bundle="tag"))
    assert result.returncode == 0, result.stderr[-3000:]
    summary = check_summary(tmp_path / "out", items=5)
    assert "accuracy_heldout_templates" not in summary


def test_problems_of_a_file_are_split(recipe, tmp_path):
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    file = str(tmp_path / "train.jsonl")
    train, heldout = recipe.load_datasets(recipe.RecipeArguments(dataset_name=file, eval_items=4), seed=0)
    assert train["answer"][:] == [str(n) for n in range(20)]
    assert heldout["heldout"]["answer"][:] == ["20", "21", "22", "23"]
    # a folder has a test split
    train, heldout = recipe.load_datasets(recipe.RecipeArguments(dataset_name=str(tmp_path), eval_items=4), seed=0)
    assert len(train) == 24
    assert heldout["heldout"]["answer"][:] == ["0", "1", "2"]
    # and a file can be named
    arguments = recipe.RecipeArguments(
        dataset_name=file, eval_dataset_name=str(tmp_path / "test.jsonl"), eval_items=2, train_items=7
    )
    train, heldout = recipe.load_datasets(arguments, seed=0)
    assert len(train) == 7
    assert heldout["heldout"]["answer"][:] == ["0", "1"]
    with pytest.raises(ValueError, match="has 24 rows, too few to hold out 24"):
        recipe.load_datasets(recipe.RecipeArguments(dataset_name=file, eval_items=24), seed=0)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--dataset_name", "nowhere/train.jsonl"], 1, "nowhere/train.jsonl does not exist"),
        (["--dataset_name", "no-such-org/no-such-dataset"], 1, "--dataset_name arithmetic"),
        (["--dataset_name", "{folder}/bad.jsonl"], 1, "bad.jsonl, line 1: no text in column 'question'"),
        (["--model_name_or_path", "no-such-org/no-such-model"], 1, "--model_name_or_path embedded"),
        (["--model_name_or_path", "{folder}/base"], 1, "has no chat template"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--config", "{folder}/unknown.yaml"], 2, "no_such_option"),
        (["--config", "{folder}/broken.yaml"], 2, "broken.yaml"),
        (["--num_generations", "7"], 2, "must be divisible by num_generations (7)"),
        (["--eval_items", "0"], 2, "--eval_items must be at least 1, got 0"),
        (["--resume_from_checkpoint", "latest"], 2, "there is no checkpoint in"),
        (["--resume_from_checkpoint", "nowhere"], 2, "'nowhere' is no whole checkpoint"),
        (["--output_dir", "{folder}/bad.jsonl/out"], 2, "choose another --output_dir"),
        (["--reward_weights", "1", "2"], 2, "5 rewards"),
        (["--no_such_option", "1"], 2, "there is no option --no_such_option"),
        (["--learing_rate", "1"], 2, "there is no option --learing_rate: did you mean --learning_rate?"),
        (["--learing-rate=1"], 2, "did you mean --learning_rate?"),
        (["--learning_rate", "1", "2"], 2, "'2' belongs to no option"),
        (["--learning_rate", "fast"], 2, "--learning_rate/--learning-rate: invalid float value: 'fast'"),
        (
            ["--bundle", "gms8k"],
            2,
            "--bundle: gms8k: there is no reward and no bundle of this name: did you mean gsm8k?",
        ),
        (["--lr_scheduler_type", "linaer"], 2, "did you mean linear?"),
        (
            ["--config", "{folder}/misspelt.yaml"],
            2,
            "misspelt.yaml: there is no option 'train_itmes': did you mean train_",
        ),
        (
            ["--config={folder}/choice.yaml"],
            2,
            "shared_prefix: got 'onn', which is none of 'auto', 'on', 'off': did you mean on?",
        ),
        (["--config", "{folder}/type.yaml"], 2, "max_steps: got 2.5, which is no int"),
        (["--config"], 2, "--config: the file's name is missing"),
        (["--config", "a.yaml", "--config", "b.yaml"], 2, "--config is there twice"),
        (["--report_to", "wandb"], 2, "--report_to wandb: no such tracker is installed"),
        (["--remove_unused_columns", "true"], 2, "would remove the answers"),
        (["--loss_type", "grop"], 2, "loss_type: got 'grop', which is none of 'grpo', "),
        (["--scale_rewards", "grup"], 2, "did you mean group?"),
        (["--temperature", "0"], 2, "--temperature must be greater than 0"),
        (["--config", "{folder}/null.yaml"], 2, "bundle: there is no value"),
        (["--config", "{folder}/number.yaml"], 2, "reward_weights: got 2, which is no list"),
        (["--config", "{folder}/kwargs.yaml"], 2, "model_init_kwargs: got 'x', which is no mapping"),
        (["--config", "{folder}/text.yaml"], 2, "dataset_name: got 5, which is no text"),
        (["--config", "{folder}/scheduler.yaml"], 2, "did you mean cosine?"),
        (["--report_to", "tensorbord"], 2, "did you mean tensorboard?"),
        (
            ["--eval_dataset_name", "nowhere.jsonl", "--dataset_name", "{folder}/good.jsonl"],
            1,
            "--eval_dataset_name: data set 'nowhere.jsonl' cannot be loaded. Cause: nowhere.jsonl does not exist",
        ),
        (["--output_dir", ""], 2, "--output_dir is empty"),
        (["--lr", "1"], 2, "there is no option --lr"),
        (["--use_vllm", "true"], 1, "Please install vLLM"),
        (
            ["--use_peft", "true", "--lora_target_modules", "no_such_layer"],
            1,
            "no_such_layer not found in the base model",
        ),
    ],
)
def test_errors_are_one_line(recipe, tmp_path, capsys, monkeypatch, arguments, status, message):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda: False)
    settings = {
        "misspelt": "train_itmes: 3",
        "choice": "shared_prefix: onn",
        "type": "max_steps: 2.5",
        "null": "bundle: null",
        "number": "reward_weights: 2",
        "kwargs": "model_init_kwargs: x",
        "text": "dataset_name: 5",
        "scheduler": "lr_scheduler_type: cosin",
    }
    (tmp_path / "good.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    for name, setting in settings.items():
        (tmp_path / f"{name}.yaml").write_text(f"use_cpu: true\nbf16: false\n{setting}\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "unknown.yaml").write_text("use_cpu: true\nbf16: false\nno_such_option: 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    save_tiny_policy(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "base" / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "base")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["--output_dir", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == status
    shown = capsys.readouterr().err
    assert "usage:" not in shown
    last_line = shown.rstrip("\n").split("\n")[-1]
    assert "error: " in last_line
    assert message in last_line


def test_numbers_that_a_file_has_as_texts(recipe, tmp_path):
    (tmp_path / "run.yaml").write_text(
        'use_cpu: true\nbf16: false\nmodel_name_or_path: embedded\noutput_dir: out\nreward_weights: ["1", "0.5"]\n'
    )
    _, training_args, _, settings = recipe.parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert training_args.reward_weights == settings["reward_weights"] == [1.0, 0.5]


def test_deepspeed_is_not_installed(recipe, tmp_path, capsys, monkeypatch):
    """It is asked for by an option, or by a launch configuration, which sets the environment of the ranks."""
    monkeypatch.setattr("accelerate.utils.is_deepspeed_available", lambda: False)
    for arguments in (["--deepspeed", "zero.json"], []):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(["--output_dir", str(tmp_path / "out"), *arguments])
        assert stopped.value.code == 2
        assert "error: DeepSpeed is not installed: install it" in capsys.readouterr().err.splitlines()[-1]
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


def test_a_value_that_training_refuses_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    """And nothing is noted of a run that has not begun."""

    def refuse(*args, **kwargs):
        raise ValueError("not\nthis")

    monkeypatch.setattr(recipe.GRPOExtTrainer, "train", refuse)
    with pytest.raises(SystemExit) as stopped:
        recipe.main(small(tmp_path))
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: not this"
    assert not (tmp_path / RUN_FILE).exists()


@pytest.mark.slow
def test_two_runs_and_one_folder(recipe, tmp_path, capsys):
    """A run starts in its own folder again, with its own record; another one neither starts there nor goes on."""
    out = tmp_path / "out"
    options = {"max_steps": 1, "save_steps": 1, "eval_items": 1, "eval_samples": 0, "max_completion_length": 8}
    recipe.main(small(out, **options))
    settings = read_run(out).settings
    assert settings["model_name_or_path"] == "embedded"
    assert read_run(out / "checkpoint-1").settings == settings

    others = {"bundle": "tag", "learning_rate": 0.5, "max_completion_length": 9}
    for resume in ((), ("--resume_from_checkpoint", "latest"), ("--resume_from_checkpoint", "auto")):
        with pytest.raises(SystemExit) as stopped:
            recipe.main([*small(out, **{**options, **others}), *resume])
        assert stopped.value.code == 2
        last_line = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert "bundle 'gsm8k' -> 'tag', learning_rate 0.0002 -> 0.5, max_completion_length 8 -> 9" in last_line

    (out / "checkpoint-1").rename(out / "checkpoint-7")  # a later one than this attempt makes
    recipe.main(["--config", str(out / RUN_FILE)])
    assert f"note: the same run was in '{out}'; this one starts afresh" in capsys.readouterr().err
    assert set(checkpoints(out)) == {1}

    recipe.main(["--config", str(out / RUN_FILE), "--resume_from_checkpoint", "auto", "--max_steps", "2"])
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert read_run(out).settings == {**settings, "max_steps": 2}


@pytest.mark.slow
def test_held_out_problems_are_evaluated_while_training(recipe, tmp_path):
    """The rewards, as TRL does, and the answers; before and after too."""
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_items": 2,
        "eval_samples": 0,
        "max_completion_length": 8,
    }
    recipe.main(small(tmp_path, per_device_eval_batch_size=8, save_strategy="no", **options))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [1, 2]
    assert [entry["step"] for entry in log if "eval_answer" in entry] == [0, 1, 2]
    answers = read_answers(tmp_path / "answers" / "after.jsonl")
    assert [answer.finish_reason for answer in answers] == ["length"] * 2
    after = json.loads((tmp_path / "summary.json").read_text())["accuracy"]["after"]
    assert after["truncated"]["mean"] == 1.0
    assert after["tokens"]["mean"] == 8.0


@pytest.mark.slow
def test_training_ends_in_time(recipe, tmp_path, monkeypatch):
    """Before a step that would take it beyond its minutes, with a checkpoint of the last one."""
    clock = itertools.count(step=60)  # a minute between two looks
    monkeypatch.setattr(script, "monotonic", lambda: next(clock))
    options = {"max_minutes": 3.5, "max_steps": 10, "save_strategy": "steps", "save_steps": 100}
    recipe.main(small(tmp_path, **options))
    assert json.loads((tmp_path / "summary.json").read_text())["optimizer_steps"] == 3
    assert list(checkpoints(tmp_path)) == [3]
    recipe.main(
        small(tmp_path, **{**options, "max_minutes": 2.5}, resume_from_checkpoint="auto")
    )  # minutes of its own
    assert json.loads((tmp_path / "summary.json").read_text())["optimizer_steps"] == 5


@pytest.mark.slow
def test_an_error_is_the_last_line_under_the_launcher(tmp_path):
    # a folder of its own: the default one may hold the demo's run, which comes first
    result = run(
        "--bundle",
        "gms8k",
        "--output_dir",
        str(tmp_path),
        launcher=[str(Path(sys.executable).with_name("accelerate")), "launch"],
    )
    assert result.returncode != 0
    assert "CalledProcessError" in result.stderr  # the launcher's own words
    assert result.stderr.rstrip("\n").split("\n")[-1].endswith("did you mean gsm8k?")


@pytest.mark.slow
def test_resuming_ends_where_the_run_would_have_ended(tmp_path):
    straight = run(*small(tmp_path / "straight", max_steps=4, save_steps=2))
    assert straight.returncode == 0, straight.stderr[-3000:]
    options = {"max_steps": 4, "save_steps": 2, "resume_from_checkpoint": tmp_path / "straight" / "checkpoint-2"}
    resumed = run(*small(tmp_path / "resumed", **options))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    straight_summary = check_summary(tmp_path / "straight", steps=4)
    resumed_summary = json.loads((tmp_path / "resumed" / "summary.json").read_text())
    assert resumed_summary["accuracy"]["after"] == straight_summary["accuracy"]["after"]
    assert resumed_summary["accuracy"]["before"] is None  # measured where the run began, in another folder
    weights = load_file(tmp_path / "straight" / "model.safetensors")
    for name, weight in load_file(tmp_path / "resumed" / "model.safetensors").items():
        assert weight.equal(weights[name]), name
    # 'latest' finds the newest checkpoint; there is nothing left to train
    latest = run(*small(tmp_path / "straight", max_steps=4, save_steps=2, resume_from_checkpoint="latest"))
    assert latest.returncode == 0, latest.stderr[-3000:]
    again = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert again["accuracy"]["before"] == straight_summary["accuracy"]["before"]


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    """The README's promise: a run with no argument but where to write."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    result = run("--output_dir", tmp_path / "out", "--seed", 1, launcher=launch)
    assert result.returncode == 0, result.stderr[-3000:]
    accuracy = json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]
    assert accuracy["before"]["items"] == accuracy["after"]["items"] == 200
    assert accuracy["before"]["strict"]["mean"] <= 0.45
    assert accuracy["before"]["strict_mean@4"]["mean"] <= 0.40
    assert accuracy["after"]["strict"]["mean"] >= 0.90
    assert accuracy["after"]["strict_mean@4"]["mean"] >= 0.80
    assert accuracy["before"]["strict"]["high"] < accuracy["after"]["strict"]["low"]
