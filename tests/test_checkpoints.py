"""A checkpoint is whole or not there; the newest whole one is found."""

import json
import resource
import shutil

import pytest
from canned import assert_same_weights, canned_config, train_canned
from transformers import TrainerCallback

from trl_grpo_ext.checkpoints import ASIDE, MANIFEST, CheckpointError, find_damage, whole_checkpoints
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.rollouts import FOLDER as ROLLOUTS
from trl_grpo_ext.trainer import GRPOExtTrainer


def train(policy, output_dir, resume=None, callbacks=(), **options):
    options = {"num_iterations": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, **options}
    args = canned_config(output_dir, GRPOExtConfig, **options)
    return train_canned(GRPOExtTrainer, args, policy, resume=resume, callbacks=callbacks)


@pytest.fixture(scope="module")
def straight(policy, tmp_path_factory):
    return train(policy, tmp_path_factory.mktemp("straight"))


@pytest.fixture
def saved(straight, tmp_path):
    """A folder of its own with the checkpoints of a run of 4 steps."""
    return shutil.copytree(straight.trainer.args.output_dir, tmp_path / "saved")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def test_the_manifest_knows_every_file(saved):
    folder = saved / "checkpoint-2"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == found - {MANIFEST}
    assert {"model.safetensors", "trainer_state.json", f"{ROLLOUTS}/rank-00000-of-00001.safetensors"} <= set(files)
    assert find_damage(folder) is None
    assert not (saved / ASIDE).exists()
    assert (sorted(whole_checkpoints(saved)[0]), whole_checkpoints(saved)[1]) == ([1, 2, 3, 4], [])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", truncate, "model.safetensors has .* bytes, and .* were written"),
        ("optimizer.pt", truncate, "optimizer.pt has"),
        ("optimizer.pt", lambda file: file.unlink(), "optimizer.pt is missing"),
        ("trainer_state.json", lambda file: file.unlink(), "trainer_state.json is missing"),
        (MANIFEST, truncate, "manifest.json cannot be read"),
        (MANIFEST, lambda file: file.write_text('{"files": 3}'), "manifest.json cannot be read"),
        (f"{ROLLOUTS}/rank-00000-of-00001.safetensors", truncate, "without the folder 'rollouts', fresh rollouts"),
    ],
)
def test_resuming_passes_over_what_is_damaged(straight, saved, policy, caplog, file, damage, message):
    damage(saved / "checkpoint-4" / file)
    damage(saved / "checkpoint-3" / file)
    resumed = train(policy, saved, resume=True)
    assert caplog.text.count("A checkpoint is passed over") == 2
    assert_same_weights(resumed.weights, straight.weights)
    assert len(resumed.exact_grad_norms) == 2
    if not file.startswith(ROLLOUTS):
        damage(saved / "checkpoint-2" / file)
        with pytest.raises(CheckpointError, match=message) as error:
            train(policy, saved, resume=str(saved / "checkpoint-2"))
        assert "\n" not in str(error.value)


def test_there_is_no_whole_checkpoint(saved, policy, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no whole checkpoint in '.*': start afresh"):
        train(policy, tmp_path / "nothing", resume=True)
    for step in range(1, 5):
        (saved / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-\d.trainer_state.json is missing"):
        train(policy, saved, resume=True)


def test_one_of_another_trainer_is_taken(saved, policy):
    (saved / "checkpoint-4" / MANIFEST).unlink()
    assert 4 in whole_checkpoints(saved)[0]


class FullDisk(TrainerCallback):
    """From a step on no file of this process may be longer than so many bytes: a disk that fills up."""

    def __init__(self, at_step, num_bytes):
        self.at_step, self.num_bytes = at_step, num_bytes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, resource.RLIM_INFINITY))


@pytest.mark.parametrize("num_bytes", [40_000, 80_000])  # the model fails, or the optimizer
def test_full_disk(straight, policy, tmp_path, num_bytes):
    try:
        with pytest.raises(CheckpointError, match=r"rank 0 could not write checkpoint .*checkpoint-3") as error:
            train(policy, tmp_path, callbacks=[FullDisk(3, num_bytes)], optim="adamw_torch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert f"The newest whole one is '{tmp_path / 'checkpoint-2'}'" in str(error.value)
    assert sorted(whole_checkpoints(tmp_path)[0]) == [1, 2]
    assert not (tmp_path / ASIDE).exists()
    resumed = train(policy, tmp_path, resume=True, optim="adamw_torch")
    assert sorted(whole_checkpoints(tmp_path)[0]) == [1, 2, 3, 4]
    assert resumed.trainer.state.global_step == 4


def test_what_a_killed_run_left_is_no_checkpoint(straight, saved, policy):
    left = saved / ASIDE / "checkpoint-5"
    shutil.copytree(saved / "checkpoint-4", left)
    assert max(whole_checkpoints(saved)[0]) == 4
    shutil.rmtree(saved / "checkpoint-4")
    train(policy, saved, resume=True)
    assert not (saved / ASIDE).exists()


def test_limit_and_best_checkpoint(policy, tmp_path):
    """What transformers does with checkpoints when it has written one, it does where they lie in the end."""
    train(policy, tmp_path, save_total_limit=2)
    assert sorted(whole_checkpoints(tmp_path)[0]) == [3, 4]

    class Best(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                state.best_global_step, state.best_metric = 2, 1.0

    run = train(policy, tmp_path / "best", save_total_limit=2, callbacks=[Best()])
    best = str(tmp_path / "best" / "checkpoint-2")
    assert run.trainer.state.best_model_checkpoint == best
    assert sorted(whole_checkpoints(tmp_path / "best")[0]) == [2, 4]
    for step in (2, 4):
        state = json.loads((tmp_path / "best" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best


def test_what_is_there_is_replaced(straight, policy, saved):
    (saved / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    resumed = train(policy, saved, resume=str(saved / "checkpoint-1"))
    assert whole_checkpoints(saved)[1] == []
    assert_same_weights(resumed.weights, straight.weights)
