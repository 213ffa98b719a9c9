"""A checkpoint of somebody else's is no program: what is in it besides numbers is not run by going on from it."""

import os
import pickle
import shutil

import pytest
import torch
from canned import canned_config, train_canned
from safetensors.torch import load_file

from trl_grpo_ext.checkpoints import MANIFEST, CheckpointError
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.trainer import GRPOExtTrainer
from trl_grpo_ext.weights_only import FORCE_WEIGHTS_ONLY, NotWeightsError, check_metadata, loading_only_weights


class Hostile:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('hostile').touch()",)


def train(policy, output_dir, resume=None, **options):
    args = canned_config(output_dir, GRPOExtConfig, max_steps=2, save_strategy="steps", save_steps=1, **options)
    return train_canned(GRPOExtTrainer, args, policy, resume=resume)


@pytest.fixture(scope="module")
def straight(policy, tmp_path_factory):
    return train(policy, tmp_path_factory.mktemp("straight")).trainer.args.output_dir


@pytest.fixture
def checkpoint(straight, tmp_path, monkeypatch):
    """One of somebody else's: whatever is in it, no manifest tells."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "saved" / "checkpoint-1"
    shutil.copytree(f"{straight}/checkpoint-1", folder)
    (folder / MANIFEST).unlink()
    return folder


# How each file is read: refused with a line of ours, refused by transformers, or not read at all
@pytest.mark.parametrize(
    ("name", "raises"),
    [
        ("optimizer.pt", CheckpointError),
        ("scheduler.pt", CheckpointError),
        ("pytorch_model.bin", CheckpointError),
        ("rng_state.pth", pickle.UnpicklingError),
        ("training_args.bin", None),
    ],
)
def test_a_program_in_a_checkpoint_is_not_run(policy, checkpoint, tmp_path, name, raises):
    weights = load_file(checkpoint / "model.safetensors")
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"x": Hostile(), **weights}, checkpoint / name)
    if raises is None:
        train(policy, tmp_path / "saved", resume=str(checkpoint))
    else:
        with pytest.raises(raises) as raised:
            train(policy, tmp_path / "saved", resume=str(checkpoint))
        assert raises is not CheckpointError or "it asks for exec" in str(raised.value)
        assert raises is not CheckpointError or "\n" not in str(raised.value)
    assert not (tmp_path / "hostile").exists()
    assert FORCE_WEIGHTS_ONLY not in os.environ


def test_a_list_of_shards_is_no_program(policy, checkpoint, tmp_path):
    (checkpoint / "optimizer_0").mkdir()
    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(NotWeightsError, match=r"builtins\.exec"):
        check_metadata(checkpoint)
    with pytest.raises(CheckpointError, match=r"builtins\.exec"):
        train(policy, tmp_path / "saved", resume=str(checkpoint))
    assert not (tmp_path / "hostile").exists()


def test_training_itself_may_load_what_it_likes(policy, checkpoint, tmp_path):
    torch.save({"x": range(3)}, tmp_path / "of_the_user.pt")
    seen = []

    def reward(completion_ids, **_):
        seen.append(torch.load(tmp_path / "of_the_user.pt", weights_only=False)["x"])
        return [float(len(ids)) for ids in completion_ids]

    args = canned_config(tmp_path / "saved", GRPOExtConfig, max_steps=3)
    train_canned(GRPOExtTrainer, args, policy, resume=str(checkpoint), reward=reward)
    assert seen[-1] == range(3)


@pytest.mark.parametrize("before", [None, "0"])
def test_numbers_alone_are_loaded_whatever_is_asked_for(tmp_path, monkeypatch, before):
    monkeypatch.chdir(tmp_path)
    if before is not None:
        monkeypatch.setenv(FORCE_WEIGHTS_ONLY, before)
    torch.save(Hostile(), "file")
    with loading_only_weights(), pytest.raises(pickle.UnpicklingError):
        torch.load("file", weights_only=False)
    assert not (tmp_path / "hostile").exists()
    assert os.environ.get(FORCE_WEIGHTS_ONLY) == before
