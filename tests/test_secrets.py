"""What a run writes and says holds no token, no other variable of the environment, and no home folder."""

import copy
import json
import os
import pickle
import sys

import pytest
from canned import canned_config
from launch import ROOT, run_to_the_end
from tiny import save_tiny_policy

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.private import command_without_secrets, expand_home, hide_home, is_secret, shorten_home
from trl_grpo_ext.runs import RunRecord, read_run, settings_of


RECIPE = ROOT / "recipes" / "gsm8k.py"
PLANTED = {
    "HF_TOKEN": "hf_plantedEnvironmentToken1234567890",
    "WANDB_API_KEY": "plantedwandbkey0123456789abcdef0123456789",
    "AWS_SECRET_ACCESS_KEY": "plantedAwsSecret/abcdefghijklmnop",
    "OPENAI_API_KEY": "sk-planted-openai-0123456789",
    "UNRELATED_OF_MINE": "planted-unrelated-value",
}
ON_COMMAND_LINE = "hf_plantedOnTheCommandLine0123456789"
IN_FILE = "hf_plantedInTheFile0123456789"
# What transformers makes of its arguments, `output_dir` among them: a pickle beside the weights, and a text in
# TensorBoard. Tokens are not in there; a home folder is, where the output folder is below it.
OF_TRANSFORMERS = ("training_args.bin", "events.out.tfevents")


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home-planted-xyz"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.slow
def test_a_run_tells_nothing(tmp_path, home):
    """Everything lies in a home folder, tokens are wherever one may be given; then the run goes on from its file."""
    policy = save_tiny_policy(home / "models" / "tiny")
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(16)]
    data = home / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = home / "settings.yaml"
    config.write_text((RECIPE.parent / "configs" / "offline-tiny.yaml").read_text() + f"hub_token: {IN_FILE}\n")
    output = home / "out"
    options = {
        "config": config,
        "model_name_or_path": policy,
        "dataset_name": data,
        "output_dir": output,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "eval_items": 4,
        "eval_samples": 1,
        "report_to": "tensorboard",
        "log_completions": "true",
        "hub_token": ON_COMMAND_LINE,
    }
    environment = {**os.environ, **PLANTED, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    said = []
    for arguments in (
        [word for name, value in options.items() for word in (f"--{name}", str(value))],
        ["--config", "out/run.yaml", "--max_steps", "3", "--resume_from_checkpoint", "latest", "--hub_token", IN_FILE],
    ):
        command = [sys.executable, str(RECIPE), *arguments]
        result = run_to_the_end(command, 300, folder=home, environment=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        said.append(result.stdout + result.stderr)
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 3
    assert read_run(output).settings["model_name_or_path"] == policy

    tokens = [*PLANTED.values(), ON_COMMAND_LINE, IN_FILE]
    files = {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    expected = {"README.md", "record.jsonl", "report.html", "run.yaml", "summary.json", "trainer_state.json"}
    assert expected <= set(map(str, files))
    assert all(any(name in str(path) for path in files) for name in (*OF_TRANSFORMERS, "checkpoint-3", "answers"))
    for path, content in files.items():
        assert not [token for token in tokens if token.encode() in content], path
        if not path.name.startswith(OF_TRANSFORMERS):
            assert str(home).encode() not in content, path
    for text in said:
        assert not [secret for secret in (*tokens, str(home)) if secret in text], text


def test_paths_of_a_run_are_below_any_home(tmp_path, home, monkeypatch):
    others = [f"{home}s", f"{home}/b", 3]
    settings = {"model_name_or_path": f"{home}/models/a", "output_dir": str(home), "also": others}
    RunRecord(settings, [{"checkpoint": f"{home}/c"}]).write(tmp_path)
    written = (tmp_path / "run.yaml").read_text()
    assert f"{home}/" not in written
    assert (read_run(tmp_path).settings, read_run(tmp_path).changes) == (settings, [{"checkpoint": f"{home}/c"}])
    monkeypatch.setenv("HOME", "/another")
    assert read_run(tmp_path).settings["model_name_or_path"] == "/another/models/a"


@pytest.mark.parametrize("place", ["/", ""])
def test_a_root_is_no_home(monkeypatch, place):
    monkeypatch.setenv("HOME", place)
    for value in ("/a/b", "/", ["/a"], {"x": None}):
        assert shorten_home(value) == value
    assert hide_home("in /a/b") == "in /a/b"


def test_home_is_hidden_in_texts(home):
    assert hide_home(f"from {home}/a to '{home}/b'") == "from ~/a to '~/b'"
    assert expand_home(["~", "~/a", "~b", "a~/"]) == [str(home), f"{home}/a", "~b", "a~/"]


def test_secrets_are_known_by_their_names():
    assert all(map(is_secret, ["hub_token", "token", "wandb_api_key", "password", "client_secret"]))
    assert not any(map(is_secret, ["average_tokens_across_devices", "tokenizer", "tokens_per_micro_batch"]))
    settings = settings_of(
        {"hub_token": "x", "vllm_server_base_url": "http://me:pw@host:8000/v1", "kwargs": {"token": "x", "a": 1}}
    )
    assert settings == {"vllm_server_base_url": "http://host:8000/v1", "kwargs": {"a": 1}}


def test_a_command_to_go_on_with_has_no_token(home):
    tokens = ["--hub_token", "hf_x", "--hub-token=hf_y"]
    shown = command_without_secrets(["accelerate", "launch", f"{home}/a.py", *tokens, "--model", f"{home}/a b"])
    assert shown == f"accelerate launch ~/a.py --hub_token ... --hub-token=... --model '{home}/a b'"


def test_pickled_arguments_have_no_token(tmp_path):
    args = canned_config(tmp_path, GRPOExtConfig, hub_token="hf_x")
    assert b"hf_x" not in pickle.dumps(args)
    loaded = pickle.loads(pickle.dumps(args))
    assert (loaded.hub_token, loaded.output_dir, loaded.target_kl) == (None, args.output_dir, args.target_kl)
    assert args.hub_token == copy.copy(args).hub_token == copy.deepcopy(args).hub_token == "hf_x"
