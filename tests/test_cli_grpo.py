"""`trl-grpo-ext grpo` and `accelerate launch -m trl_grpo_ext.grpo`: GRPO on anybody's data."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from launch import ROOT, launcher, run_to_the_end
from safetensors.torch import load_file
from trl.scripts.grpo import make_parser

from trl_grpo_ext import grpo
from trl_grpo_ext.cli.grpo import main as start
from trl_grpo_ext.cli.grpo import split_arguments, without
from trl_grpo_ext.evaluation import read_answers
from trl_grpo_ext.runs import RUN_FILE, read_run


REWARDS = '''
def length(completions, difficulty, **kwargs):
    """TRL gives texts where prompts are texts, and messages where they are messages."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(map(ord, text)) * level for text, level in zip(texts, difficulty, strict=True)]
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a module of rewards, a data set as TRL has them, and one as others have them."""
    (tmp_path / "rewards_of_a_user.py").write_text(REWARDS)
    rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1), "difficulty": 1 + n % 3} for n in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, numbers in (("problems.csv", range(16)), ("heldout.csv", range(20, 25))):
        lines = ["nr,task,result,difficulty", *(f'{n},"What is {n}, plus 1?",{n + 1},{1 + n % 3}' for n in numbers)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("rewards_of_a_user", None)


def settings(policy, **others):
    """A configuration for `trl grpo`, of a run that takes a second."""
    return {
        "model_name_or_path": policy,
        "output_dir": "out",
        "reward_funcs": ["rewards_of_a_user.length"],
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": "1e-2",  # as yaml reads 1e-2
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "run_name": 2024,
        **others,
    }


def write_config(folder, policy, **others):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings(policy, **others)))
    return str(file)


def has_moved(folder, policy):
    weights, start = load_file(folder / "model.safetensors"), load_file(Path(policy) / "model.safetensors")
    return any(not weight.equal(start[name]) for name, weight in weights.items() if name in start)


MIXTURE = [{"path": "json", "data_files": "prompts.jsonl", "split": "train[:8]", "fraction": None}]


@pytest.mark.slow
def test_a_configuration_of_trls_trains(folder, policy, capsys):
    """One that has a mixture of data sets, a dotted name of a reward, and options of the launcher."""
    config = write_config(folder, policy, datasets=MIXTURE, num_processes=1, test_split_size=0.25)
    *theirs, remaining = make_parser().parse_args_and_config(["--config", config], return_remaining_strings=True)
    ours = grpo.parse_arguments(["--config", config])
    for their_args, our_args in zip(theirs, ours, strict=False):
        for item in fields(their_args):
            if item.init and item.name not in ("logging_dir", "run_name"):
                assert getattr(our_args, item.name) == getattr(their_args, item.name), item.name
    assert remaining == ["--num_processes", "1"]
    assert ours[1].run_name == "2024"

    grpo.main(["--config", config])
    assert has_moved(folder / "out", policy)
    assert read_run(folder / "out").settings["datasets"] == MIXTURE
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert (summary["dataset"], summary["optimizer_steps"]) == ("json", 2)
    # the same file with keys that are ours; the run's own file starts the same run
    # (and the mixture goes before a data set's name, as for `trl grpo`)
    ours_too = {"shared_prefix": "off", "save_steps": 1, "overwrite_run": True, "dataset_name": "problems.csv"}
    config = write_config(folder, policy, datasets=MIXTURE, **ours_too)
    grpo.main(["--config", config])
    assert json.loads((folder / "out" / "summary.json").read_text())["dataset"] == "json"
    grpo.main(["--config", str(folder / "out" / RUN_FILE), "--resume_from_checkpoint", "auto", "--max_steps", "3"])
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    # a run that is done, and is started again, stays as it is
    done = load_file(folder / "out" / "model.safetensors")
    grpo.main(["--config", str(folder / "out" / RUN_FILE), "--resume_from_checkpoint", "auto"])
    assert json.loads((folder / "out" / "summary.json").read_text())["optimizer_steps"] == 3
    again = load_file(folder / "out" / "model.safetensors")
    assert all(weight.equal(done[name]) for name, weight in again.items())
    # and it does not begin in the folder of another run
    with pytest.raises(SystemExit) as stopped:
        grpo.main(["--config", config, "--overwrite_run", "false", "--learning_rate", "0.5"])
    assert stopped.value.code == 2
    assert "learning_rate 0.01 -> 0.5" in capsys.readouterr().err.splitlines()[-1]


def test_a_table_with_columns_of_other_names_trains_and_evaluates(folder, policy, capsys):
    config = write_config(
        folder,
        policy,
        dataset_name="problems.csv",
        question_column="task",
        answer_column="result",
        eval_dataset_name="heldout.csv",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        eval_items=3,
        eval_samples=2,
        metric_for_best_model="answer",
        load_best_model_at_end=True,
        save_steps=1,
        reward_funcs=["tag", "rewards_of_a_user.length"],
        reward_weights=[1.0, 0.5, 2.0],
    )
    grpo.main(["--config", config])
    assert has_moved(folder / "out", policy)
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_strict" in entry][:3] == [0, 1, 2]
    assert {"eval_reward", "eval_rewards/length/mean"} <= {name for entry in log for name in entry}
    summary = json.loads((folder / "out" / "summary.json").read_text())
    for when in ("before", "after"):
        assert summary["accuracy"][when]["items"] == 3
        assert 0 <= summary["accuracy"][when]["mean@2"]["mean"] <= 1
    answers = read_answers(folder / "out" / "answers" / "before.jsonl")
    assert len(answers) == 3 * 3
    assert {answer.answer for answer in answers} == {"21", "22", "23"}
    prompt = answers[0].prompt
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert "<answer>" in prompt[0]["content"]
    assert prompt[1]["content"] == "What is 20, plus 1?"
    assert "held-out problems, 3 items" in capsys.readouterr().out


def test_a_stream_trains(folder, policy):
    config = write_config(folder, policy, dataset_name="problems.csv", dataset_streaming=True)
    grpo.main(
        ["--config", config, "--question_column", "task", "--answer_column", "result", "--system_prompt", "none"]
    )
    assert has_moved(folder / "out", policy)
    assert not (folder / "out" / "answers").exists()


@pytest.mark.parametrize(
    ("options", "roles"),
    [
        ({}, ["system", "user"]),
        ({"system_prompt": "none"}, ["user"]),
        ({"system_prompt": "Be brief."}, ["system", "user"]),
    ],
)
def test_what_becomes_of_a_row(policy, options, roles):
    arguments = grpo.GRPOExtScriptArguments(question_column="q", answer_column="a", **options)
    splits = {"train": Dataset.from_list([{"q": "Why?", "a": "x\n#### 5", "kept": 1}])}
    (row,) = grpo.choose_split(splits, "train", "mine", arguments)
    assert (row["answer"], row["kept"]) == ("5", 1)
    assert [message["role"] for message in row["prompt"]] == roles
    if roles[0] == "system":
        assert row["prompt"][0]["content"].startswith(options.get("system_prompt", "Respond in the following format"))


def test_rows_as_trl_has_them_stay_as_they_are():
    dataset = Dataset.from_list([{"prompt": "Why?", "answer": "x #### 5"}])
    assert grpo.choose_split({"train": dataset}, "train", "mine", grpo.GRPOExtScriptArguments()) is dataset
    # the answer alone is made anew, the prompts become messages
    arguments = grpo.GRPOExtScriptArguments(answer_extractor="hash", system_prompt="none")
    (row,) = grpo.choose_split({"train": dataset}, "train", "mine", arguments)
    assert row["prompt"] == [{"role": "user", "content": "Why?"}]
    assert row["answer"] == "5"


def test_problems_without_references_are_not_evaluated(capsys):
    assert grpo.find_heldout(None, 5) is None
    assert grpo.find_heldout(Dataset.from_list([{"prompt": "q"}]), 5) is None
    assert grpo.find_heldout(Dataset.from_list([{"prompt": "q", "answer": None}]), 5) is None
    assert "note: " in capsys.readouterr().err
    rows = [{"prompt": "q", "answer": str(n), "id": n // 2, "more": 1} for n in range(4)]
    problems = grpo.find_heldout(Dataset.from_list(rows).to_iterable_dataset(), 3)
    assert problems.to_list() == [{"prompt": "q", "answer": str(n)} for n in range(3)]
    assert grpo.find_heldout(Dataset.from_list(rows[1:3]), 3).column_names == ["prompt", "answer", "id"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--no_such_option", "1"], 2, "there is no option --no_such_option"),
        (
            ["--config", "misspelt.yaml"],
            2,
            "misspelt.yaml: there is no option 'question_colum': did you mean question",
        ),
        (["--answer_extractor", "latex"], 2, "invalid choice: 'latex'"),
        (["--eval_items", "0"], 2, "--eval_items must be at least 1, got 0"),
        (["--config", "rewardless.yaml"], 2, "--reward_funcs is missing"),
        (["--reward_funcs", "gms8k"], 2, "--reward_funcs: gms8k: there is no reward"),
        (["--reward_funcs", "rewards_of_a_user.lenght"], 2, "did you mean length?"),
        (["--reward_weights", "1", "2"], 2, "--reward_weights: got 2 for 1 rewards"),
        (
            ["--dataset_name", "nowhere.csv"],
            1,
            "--dataset_name: data set 'nowhere.csv' cannot be loaded. Cause: nowhere",
        ),
        (
            ["--dataset_name", "problems.csv"],
            1,
            "has no column 'prompt' (its columns are nr, task, result, difficulty)",
        ),
        (["--dataset_name", "problems.csv", "--question_column", "tsak"], 1, "row 0: no text in column 'tsak'"),
        (["--eval_strategy", "steps"], 1, "has no split 'test'; its splits are train"),
        (["--eval_dataset_name", "nowhere.csv"], 1, "--eval_dataset_name: data set 'nowhere.csv' cannot be loaded"),
        (["--model_name_or_path", "no-such-org/no-such-model"], 1, "model 'no-such-org/no-such-model' cannot be"),
        (["--resume_from_checkpoint", "latest"], 2, "there is no checkpoint in 'out'"),
        (["--dataset_streaming", "true", "--max_steps", "-1"], 1, "max_steps"),
    ],
)
def test_errors_are_one_line(folder, policy, capsys, arguments, status, message):
    (folder / "misspelt.yaml").write_text("use_cpu: true\nbf16: false\nquestion_colum: x\n")
    (folder / "rewardless.yaml").write_text("use_cpu: true\nbf16: false\nmodel_name_or_path: x\ndataset_name: y\n")
    config = (
        [] if "--config" in arguments else ["--config", write_config(folder, policy, dataset_name="prompts.jsonl")]
    )
    with pytest.raises(SystemExit) as stopped:
        grpo.main([*config, *arguments])
    last_line = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert stopped.value.code == status, last_line
    assert last_line.startswith("error: ")
    assert message in last_line


def test_the_launchers_options_are_told_from_ours(folder, policy, capsys):
    config = write_config(folder, policy, datasets=MIXTURE, num_processes=3, changed_settings=[{"checkpoint": "x"}])
    command = ["--num_machines", "1", "--learning_rate", "1", "--config", config, "--accelerate_config", "zero2"]
    args = split_arguments([*command, "--gradient_accumulation_steps", "1"])
    assert (args.module, args.training_script) == (True, "trl_grpo_ext.grpo")
    assert (args.num_processes, args.num_machines) == (3, 1)
    assert args.config_file.endswith("trl/accelerate_configs/zero2.yaml")
    ours = ["--learning_rate", "1", "--config", config, "--gradient_accumulation_steps", "1"]
    assert args.training_script_args == ours
    for arguments, message in (
        (["--num_procesess", "2"], "there is no option --num_procesess: did you mean --num_processes?"),
        (["--learing_rate", "2"], "there is no option --learing_rate: did you mean --learning_rate?"),
        (["--learning_rate", "1", "2"], "'2' belongs to no option"),
        (["--num_processes", "many"], "invalid int value: 'many'"),
        (["--accelerate_config", "zero9"], "zero9 is neither a file nor a valid config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--loss_type", "grop"], "loss_type: got 'grop'"),
        (["--config", "misspelt.yaml"], "there is no option 'num_procesess': did you mean num_processes?"),
    ):
        (folder / "misspelt.yaml").write_text("num_procesess: 3\n")
        with pytest.raises(SystemExit) as stopped:
            split_arguments(arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert without(["--a", "4", "--b", "4"], ["--b", "4"]) == ["--a", "4"]


def test_help_is_quick_and_has_an_example(capsys):
    start(["--help"])
    shown = capsys.readouterr().out
    assert "--question_column" in shown
    assert "trl-grpo-ext grpo --config run.yaml" in shown
    assert "--help_all" in shown
    assert "--learning_rate" not in shown
    start(["--help_all"])
    assert "--learning_rate" in capsys.readouterr().out
    code = "import sys\nfrom trl_grpo_ext.cli import main\nmain(['grpo', '--help'])\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_the_command_ends_as_the_run_does(folder, policy, monkeypatch):
    started = []

    def launch(arguments):
        started.append(arguments.training_script_args)
        raise subprocess.CalledProcessError(2, ["python"])

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    arguments = ["--config", write_config(folder, policy, dataset_name="prompts.jsonl")]
    with pytest.raises(SystemExit) as stopped:
        start([*arguments, "--num_processes", "1"])
    assert stopped.value.code == 2
    assert started == [arguments]
    # a process that a launcher has started is one of the ranks
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("trl_grpo_ext.ranks.run_as_rank", lambda main, given: started.append((main, given)))
    start(arguments)
    assert started[1:] == [(grpo.main, arguments)]


@pytest.mark.distributed
@pytest.mark.slow
def test_the_command_starts_the_launcher(folder, policy):
    """The exit status and the last line are the run's own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    config = write_config(folder, policy, dataset_name="prompts.jsonl", eval_strategy="steps")
    command = [sys.executable, "-m", "trl_grpo_ext", "grpo", "--config", config, "--num_processes", "1"]
    result = run_to_the_end(command, folder=folder, environment=environment)
    assert result.returncode == 1
    assert "has no split 'test'" in result.stderr.rstrip("\n").split("\n")[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks(folder, policy):
    """The module ends under a launcher as the recipe does, and both ranks train on the same table."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    config = write_config(
        folder,
        policy,
        dataset_name="problems.csv",
        eval_dataset_name="heldout.csv",
        question_column="task",
        answer_column="result",
        eval_samples=2,
    )
    accelerate = launcher("ddp_cpu.yaml", is_warm=False)
    command = [*accelerate, "-m", "trl_grpo_ext.grpo", "--config", config]
    result = run_to_the_end(command, folder=folder, environment=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["accuracy"]["after"]["items"] == 5
    assert has_moved(folder / "out", policy)
    result = run_to_the_end([*command, "--learning_rate", "1"], folder=folder, environment=environment)
    assert result.returncode != 0
    last_line = result.stderr.rstrip("\n").split("\n")[-1]
    assert last_line.startswith("error: ")
    assert "learning_rate 0.01 -> 1" in last_line
