"""A checkpoint is whole or not there; the newest whole one is found."""

import ctypes
import json
import os
import resource
import shutil
import socket
import subprocess
import sys

import psutil
import pytest
from canned import assert_same_weights, canned_config, train_canned
from transformers import TrainerCallback

from trl_grpo_ext.checkpoints import (
    ASIDE,
    EARLIER,
    MANIFEST,
    CheckpointError,
    find_damage,
    find_missing,
    whole_checkpoints,
)
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.rollouts import FOLDER as ROLLOUTS
from trl_grpo_ext.runs import RUN_FILE, RunRecord, read_run
from trl_grpo_ext.trainer import GRPOExtTrainer


def train(policy, output_dir, resume=None, callbacks=(), trainer_class=GRPOExtTrainer, **options):
    options = {"num_iterations": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, **options}
    args = canned_config(output_dir, GRPOExtConfig, **options)
    return train_canned(trainer_class, args, policy, resume=resume, callbacks=callbacks)


def unfinished(folder):
    """What lies in an output folder of checkpoints that were being written."""
    return sorted(folder.glob(f"{ASIDE}*"))


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
    assert unfinished(saved) == []
    assert (sorted(whole_checkpoints(saved)[0]), whole_checkpoints(saved)[1]) == ([1, 2, 3, 4], [])


@pytest.mark.slow
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
    assert unfinished(tmp_path) == []
    resumed = train(policy, tmp_path, resume=True, optim="adamw_torch")
    assert sorted(whole_checkpoints(tmp_path)[0]) == [1, 2, 3, 4]
    assert resumed.trainer.state.global_step == 4


def test_what_a_killed_run_left_is_no_checkpoint(straight, saved, policy):
    """It is removed when nobody can be writing it any more: not under a trainer that is at it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = socket.gethostname()
    names = {
        ASIDE: False,
        f"{ASIDE}-{here}-{gone.pid}-1a": False,
        f"{ASIDE}-{here}-{os.getppid()}-1b": True,
        f"{ASIDE}-far-away-{gone.pid}-1c": True,
        f"{ASIDE}-far-away-{gone.pid}-1d": False,  # for long
    }
    for name in names:
        shutil.copytree(saved / "checkpoint-4", saved / name / "checkpoint-5")
    for path in [*(saved / f"{ASIDE}-far-away-{gone.pid}-1d").rglob("*"), saved / f"{ASIDE}-far-away-{gone.pid}-1d"]:
        os.utime(path, (0, 0))
    assert max(whole_checkpoints(saved)[0]) == 4
    shutil.rmtree(saved / "checkpoint-4")
    train(policy, saved, resume=True)
    assert {path.name for path in unfinished(saved)} == {name for name, stays in names.items() if stays}


def test_two_trainers_save_into_one_folder(policy, tmp_path):
    """One begins to save and ends while the other has written its weights, but not the rest."""
    other = train(policy, tmp_path, save_strategy="no").trainer

    class Interrupted(GRPOExtTrainer):
        def save_model(self, *args, **kwargs):
            super().save_model(*args, **kwargs)
            if kwargs.get("_internal_call") and self.state.global_step == 1:
                other._save_checkpoint(other.model, None)

    train(policy, tmp_path, trainer_class=Interrupted, max_steps=2)
    assert (sorted(whole_checkpoints(tmp_path)[0]), whole_checkpoints(tmp_path)[1]) == ([1, 2, 4], [])
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.safetensors", {}, "there are no weights"),
        ("optimizer.pt", {}, "there is no optimizer"),
        ("trainer_state.json", {"save_only_model": True}, "there is no trainer_state.json"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_gets_no_manifest(policy, tmp_path, name, options, message):
    """Whoever took the file away: what is certified has weights, optimizer and the trainer's state."""

    class Lossy(GRPOExtTrainer):
        def _correct_best_checkpoint(self, aside, place):
            (aside / name).unlink()

    with pytest.raises(CheckpointError, match=rf"could not write checkpoint '.*checkpoint-1' .*{message}"):
        train(policy, tmp_path, trainer_class=Lossy, **options)
    assert list(tmp_path.glob("checkpoint-*")) == unfinished(tmp_path) == []


def test_only_the_model_is_saved(policy, tmp_path, caplog):
    train(policy, tmp_path, save_only_model=True, max_steps=1)
    assert sorted(whole_checkpoints(tmp_path)[0]) == [1]
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    train(policy, tmp_path, resume=True, max_steps=2)
    assert "the optimizer would start afresh" in caplog.text


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ("model.safetensors optimizer.pt", None),
        ("pytorch_model.bin optimizer.pt", None),
        ("adapter_model.safetensors optimizer.pt", None),
        ("policy/adapter_model.safetensors optimizer.pt", None),
        ("adapter_model.safetensors global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", None),
        # ZeRO-3 without weights for transformers
        ("global_step4/zero_pp_rank_0_mp_rank_00_model_states.pt global_step4/bf16_zero_optim_states.pt", None),
        ("pytorch_model_fsdp_0/__0_0.distcp optimizer_0/__0_0.distcp", None),
        ("pytorch_model_fsdp.bin optimizer.bin", None),
        ("config.json optimizer.pt", "no weights"),
        ("model-00001-of-00002.safetensors optimizer.pt", "no weights"),  # nobody could tell which are all
        ("global_step4/optim_states.pt", "no weights"),
        ("model.safetensors scheduler.pt", "no optimizer"),
        ("global_step4/mp_rank_00_model_states.pt", "no optimizer"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "no optimizer"),
    ],
)
def test_weights_and_optimizer_wherever_they_lie(tmp_path, files, missing):
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_missing(tmp_path, ["weights", "optimizer"])
    assert (found and f"no {found.split()[3]}") == missing


def test_a_shard_that_is_missing(tmp_path):
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    (tmp_path / shards[0]).write_bytes(b"x")
    assert find_missing(tmp_path) == f"{tmp_path / shards[1]} is missing"
    (tmp_path / shards[1]).write_bytes(b"x")
    assert find_missing(tmp_path) is None
    index.write_text("{}")
    assert "cannot be read" in find_missing(tmp_path)


def test_a_checkpoint_without_weights_is_damaged(saved):
    """With a manifest that does not name them either, or without any."""
    folder = saved / "checkpoint-4"
    (folder / "model.safetensors").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["model.safetensors"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "there are no weights in" in find_damage(folder)
    (folder / MANIFEST).unlink()
    assert "there are no weights in" in find_damage(folder)
    assert max(whole_checkpoints(saved)[0]) == 3


def test_checkpoints_note_their_run(policy, tmp_path):
    """And what an earlier attempt has saved goes when this one has saved something."""

    class Noted(GRPOExtTrainer):
        run_record = RunRecord({"learning_rate": 0.2}, [{"checkpoint": "earlier", "settings": {}}])

    (tmp_path / EARLIER / "checkpoint-9").mkdir(parents=True)
    train(policy, tmp_path, trainer_class=Noted, max_steps=1)
    assert read_run(tmp_path / "checkpoint-1") == Noted.run_record
    assert RUN_FILE in json.loads((tmp_path / "checkpoint-1" / MANIFEST).read_text())["files"]
    assert not (tmp_path / EARLIER).exists()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library that keeps what is freed")
def test_what_is_freed_is_given_back_with_each_checkpoint(policy, tmp_path):
    """What is freed between things that stay does not take up memory for ever."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, count = 2**16, 1600  # 100 MiB
    resident, staying = [], []

    class Fragments(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            places = [libc.malloc(size) for _ in range(count)]
            for place in places:
                ctypes.memset(place, 1, size)
            staying.extend(places[::16])
            for index, place in enumerate(places):
                if index % 16:
                    libc.free(place)
            resident.append(psutil.Process().memory_info().rss)

    train(policy, tmp_path, callbacks=[Fragments()], max_steps=1, num_iterations=1)
    resident.append(psutil.Process().memory_info().rss)
    for place in staying:
        libc.free(place)
    assert resident[0] - resident[1] > size * count / 2


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
