"""What makes a run this run: its settings in a file, and who may start in its folder or go on from its checkpoints."""

import itertools
import json
import os
from dataclasses import fields

import pytest
from trl import ModelConfig

from trl_grpo_ext.arguments import OneLineParser
from trl_grpo_ext.checkpoints import EARLIER, MANIFEST, STATE, checkpoints, write_manifest
from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.runs import (
    CHANGED,
    HARMLESS,
    NOT_HARMLESS,
    RUN_FILE,
    Change,
    RunError,
    RunRecord,
    begin_run,
    choose_start,
    compare,
    is_harmless,
    read_run,
    settings_of,
)


A = {"learning_rate": 1e-4, "bundle": "gsm8k", "max_completion_length": 48, "max_steps": 4, "logging_steps": 1}
B = {**A, "learning_rate": 0.5, "bundle": "tag"}
A_LONGER = {**A, "max_steps": 8, "logging_steps": 5}


def save_checkpoint(folder, step, settings=None):
    """A whole checkpoint, as a trainer leaves one behind; without settings, as one did that noted none."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (place / name).write_bytes(bytes(8))
    (place / STATE).write_text("{}")
    if settings is not None:
        RunRecord(settings).write(place)
    write_manifest(place)
    return place


def run(folder, settings=A, steps=(2, 4), **options):
    """A run that begins, saves at these steps, and ends."""
    start = choose_start(folder, settings, **options)
    begin_run(start)
    for step in steps:
        save_checkpoint(folder, step, settings)
    return start


@pytest.fixture
def folder(tmp_path):
    """The folder of a run with settings `A` and checkpoints 2 and 4."""
    run(tmp_path / "run")
    return tmp_path / "run"


def test_the_file_is_a_configuration(tmp_path):
    """What is written for training arguments starts a script with the same settings; secrets and objects stay out."""
    args = GRPOExtConfig(
        output_dir="out",
        use_cpu=True,
        bf16=False,
        learning_rate=1e-6,
        reward_weights=[1.0, 0.5],
        target_kl=0.01,
        num_iterations=2,
        model_init_kwargs={"token": "secret", "dtype": "float32"},
        hub_token="secret",
        resume_from_checkpoint="latest",
    )
    model_args = ModelConfig(model_name_or_path="yes", lora_target_modules=["q_proj"], dtype=None)
    settings = settings_of(args, model_args)
    changes = [{"checkpoint": "out/checkpoint-3", "settings": {"learning_rate": [1e-4, 1e-6]}}]
    RunRecord(settings, changes).write(tmp_path)
    assert os.listdir(tmp_path) == [RUN_FILE]
    assert "secret" not in (tmp_path / RUN_FILE).read_text()
    assert read_run(tmp_path) == RunRecord(settings, changes)

    parser = OneLineParser([GRPOExtConfig, ModelConfig])
    again, model_again = parser.parse_script(["--config", str(tmp_path / RUN_FILE)], ignore=[CHANGED])
    assert compare(settings, settings_of(parser.given)) == []
    assert settings_of(again, model_again) == settings
    assert again.resume_from_checkpoint is None
    assert settings["lr_scheduler_type"] == "linear"
    assert settings["accelerator_config"]["even_batches"] is True
    assert settings["model_init_kwargs"] == {"dtype": "float32"}
    assert "generation_batch_size" not in settings  # computed from steps_per_generation


def test_settings_that_a_file_cannot_hold(tmp_path):
    assert settings_of({"a": object(), "b": (1, 2), "c": tmp_path, "d": '{"x": 1}', "e": "{no", "api_key": "k"}) == {
        "b": [1, 2],
        "c": str(tmp_path),
        "d": {"x": 1},
        "e": "{no",
    }


def test_harmless_settings_exist():
    """A name that nothing bears is a mistake, or one that was changed upstream."""
    recipe_names = ["cpu_threads", "max_minutes", "eval_items", "eval_dataset_name"]
    names = [item.name for item in itertools.chain(fields(GRPOExtConfig), fields(ModelConfig))] + recipe_names
    for known in HARMLESS + NOT_HARMLESS:
        assert any(name.startswith(known) if known.endswith("_") else name == known for name in names), known


@pytest.mark.parametrize(
    ("names", "harmless"),
    [
        ("logging_steps save_steps max_steps num_train_epochs report_to output_dir disable_tqdm eval_steps", True),
        ("run_name hub_model_id push_to_hub ddp_timeout dataloader_num_workers log_level cpu_threads", True),
        ("vllm_server_host gradient_checkpointing eval_samples save_rollouts", True),
        ("learning_rate max_completion_length model_name_or_path dataset_name bundle reward_weights beta seed", False),
        ("num_iterations loss_type num_generations per_device_train_batch_size lora_r dtype temperature", False),
        ("eval_items eval_dataset_name train_items max_grad_norm warmup_steps gradient_accumulation_steps", False),
        ("logging saves", False),
    ],
)
def test_which_settings_make_a_run(names, harmless):
    for name in names.split():
        assert is_harmless(name) is harmless, name


def test_what_has_changed():
    assert compare(A, A_LONGER) == []
    assert compare(A, B) == [Change("bundle", "gsm8k", "tag"), Change("learning_rate", 1e-4, 0.5)]
    assert [str(change) for change in compare(A, B)] == ["bundle 'gsm8k' -> 'tag'", "learning_rate 0.0001 -> 0.5"]
    # an option that another version of TRL does not know
    assert compare(A, {**A, "new_option": 1}) == compare({**A, "old_option": 1}, A) == []


def test_a_run_starts_afresh_in_its_own_folder_only(folder):
    with pytest.raises(RunError, match=r"holds another run \(bundle 'gsm8k' -> 'tag', learning_rate .*\)") as error:
        choose_start(folder, B)
    assert "--overwrite_run true" in str(error.value)
    assert "\n" not in str(error.value)
    assert set(checkpoints(folder)) == {2, 4}  # nothing was touched

    # The same settings start afresh, and what the earlier attempt has saved is not taken for this one's.
    start = run(folder, A_LONGER, steps=())
    assert start.checkpoint is None
    assert "the same run was in" in start.notes[0]
    assert "checkpoint-2, checkpoint-4: set aside" in start.notes[1]
    assert read_run(folder).settings == A_LONGER
    assert checkpoints(folder) == {}
    assert {path.name for path in (folder / EARLIER).iterdir()} == {"checkpoint-2", "checkpoint-4"}
    with pytest.raises(RunError, match="there is no checkpoint in"):
        choose_start(folder, A, "latest")
    # again, before it has saved one: what was saved first is still there
    run(folder, steps=())
    assert {path.name for path in (folder / EARLIER).iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_another_run_is_overwritten(folder):
    start = run(folder, B, steps=[1], overwrite_run=True)
    assert "another run was in" in start.notes[0]
    assert read_run(folder).settings == B
    assert set(checkpoints(folder)) == {1}


@pytest.mark.parametrize("resume", ["latest", True, "checkpoint-4"])
def test_another_run_is_not_gone_on_from(folder, resume):
    if resume == "checkpoint-4":
        resume = str(folder / resume)
    for settings in (A, A_LONGER):
        start = choose_start(folder, settings, resume)
        assert (start.checkpoint, start.stale) == (str(folder / "checkpoint-4"), [])
        assert start.notes == [f"goes on from '{folder / 'checkpoint-4'}'"]
    with pytest.raises(RunError, match=r"is of a run with other settings \(bundle .*, learning_rate 0.0001 -> 0.5\)"):
        choose_start(folder, B, resume)
    start = choose_start(folder, B, resume, allow_changed_settings=True)
    assert "with other settings than" in start.notes[1]
    begin_run(start)
    assert set(checkpoints(folder)) == {2, 4}
    record = read_run(folder)
    assert record.settings == B
    assert record.changes == [
        {
            "checkpoint": str(folder / "checkpoint-4"),
            "settings": {"bundle": ["gsm8k", "tag"], "learning_rate": [1e-4, 0.5]},
        }
    ]
    # its next checkpoint knows of it, and so does what goes on from there
    record.write(save_checkpoint(folder, 6))
    again = choose_start(folder, {**B, "bundle": "gsm8k"}, "latest", allow_changed_settings=True)
    assert [list(change["settings"]) for change in again.record.changes] == [["bundle", "learning_rate"], ["bundle"]]


def test_going_on_sets_aside_what_comes_later(folder):
    """`latest` must not find the earlier attempt's checkpoint 4 when this one has come to 3."""
    start = choose_start(folder, A, str(folder / "checkpoint-2"))
    assert [path.name for path in start.stale] == ["checkpoint-4"]
    begin_run(start)
    save_checkpoint(folder, 3, A)
    assert choose_start(folder, A, "latest").checkpoint == str(folder / "checkpoint-3")
    assert os.listdir(folder / EARLIER) == ["checkpoint-4"]


def test_damaged_checkpoints_are_passed_over(folder):
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    start = choose_start(folder, A, "auto")
    assert start.checkpoint == str(folder / "checkpoint-2")
    assert "passed over" in start.notes[0]
    assert [path.name for path in start.stale] == ["checkpoint-4"]
    with pytest.raises(RunError, match="'nowhere' is no whole checkpoint"):
        choose_start(folder, A, "nowhere")


def test_auto_goes_on_with_this_run_or_starts_it(tmp_path, folder):
    assert choose_start(tmp_path / "new", A, "auto").checkpoint is None
    assert choose_start(folder, A_LONGER, "auto").checkpoint == str(folder / "checkpoint-4")
    with pytest.raises(RunError, match="holds another run"):
        choose_start(folder, B, "auto")
    assert choose_start(folder, B, "auto", overwrite_run=True).checkpoint is None
    assert choose_start(folder, A, "auto", overwrite_run=True).checkpoint == str(folder / "checkpoint-4")
    assert choose_start(folder, B, "auto", allow_changed_settings=True).checkpoint == str(folder / "checkpoint-4")
    # killed before it had saved anything
    run(tmp_path / "young", steps=())
    assert choose_start(tmp_path / "young", A, "auto").checkpoint is None
    # nor has it left anything that a corrected command could spoil
    assert choose_start(tmp_path / "young", B, "auto").checkpoint is None
    (tmp_path / "young" / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="holds another run"):
        choose_start(tmp_path / "young", B, "auto", allow_changed_settings=True)


def test_a_folder_whose_run_noted_no_settings(tmp_path):
    save_checkpoint(tmp_path, 3)
    for resume in (None, "auto"):
        with pytest.raises(RunError, match="holds checkpoints of a run whose settings were not recorded"):
            choose_start(tmp_path, A, resume)
    start = choose_start(tmp_path, A, "latest")
    assert start.checkpoint == str(tmp_path / "checkpoint-3")
    assert "whether it is of this run cannot be told" in start.notes[1]
    assert choose_start(tmp_path, A, overwrite_run=True).stale == [tmp_path / "checkpoint-3"]


def test_a_checkpoint_of_another_folder(tmp_path, folder):
    """The same run may go on in a new folder, but not in one that is another run's."""
    start = choose_start(tmp_path / "new", A, str(folder / "checkpoint-2"))
    assert (start.checkpoint, start.stale) == (str(folder / "checkpoint-2"), [])
    run(tmp_path / "other", B, steps=[1])
    with pytest.raises(RunError, match="holds another run"):
        choose_start(tmp_path / "other", A, str(folder / "checkpoint-2"))
    start = choose_start(tmp_path / "other", A, str(folder / "checkpoint-2"), overwrite_run=True)
    assert [path.name for path in start.stale] == ["checkpoint-1"]


@pytest.mark.parametrize(("text", "message"), [("a: [1", "cannot be read"), ("- a", "holds no settings")])
def test_a_file_that_is_no_record(folder, text, message):
    (folder / RUN_FILE).write_text(text)
    with pytest.raises(RunError, match=rf"run.yaml.* {message}.*restore or delete it$") as error:
        choose_start(folder, A)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"nothing can be written to '.*file': choose another --output_dir"):
        choose_start(tmp_path / "file" / "run", A)
    start = choose_start(tmp_path / "run", A)
    (tmp_path / "run").write_text(json.dumps("in the way"))
    with pytest.raises(RunError, match=r"nothing can be written to '.*run' \(File exists\)"):
        begin_run(start)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RunError, match="nothing can be written"):
        choose_start(tmp_path / "new", A)


def test_what_is_set_aside_stays_until_something_is_saved(folder):
    """Also when a run goes on from there, or other checkpoints of the same names are set aside."""
    run(folder, steps=[4])
    aside = folder / EARLIER / "checkpoint-2"
    for _ in range(2):
        start = choose_start(folder, A, str(aside))
        assert start.checkpoint == str(aside)
        begin_run(start)
        assert (aside / "optimizer.pt").is_file()
        assert len(list((folder / EARLIER).rglob("checkpoint-*"))) == 3
    assert checkpoints(folder) == {}


def test_what_is_gone_on_from_has_any_name(folder):
    """A copy of a checkpoint, or a link to it, is one; the output folder is none."""
    (folder / "checkpoint-2").rename(folder / "best")
    (folder / "best" / STATE).write_text('{"global_step": 2}')
    (folder / "best" / MANIFEST).unlink()
    (folder / "newest").symlink_to("checkpoint-4")
    assert [path.name for path in choose_start(folder, A, str(folder / "best")).stale] == ["checkpoint-4"]
    assert choose_start(folder, A, str(folder / "newest")).stale == []
    for name in ("model.safetensors", STATE, "optimizer.pt"):
        (folder / name).write_text("{}")
    with pytest.raises(RunError, match="is the output folder: name one of its checkpoints"):
        choose_start(folder, A, str(folder))


def test_a_model_alone_is_not_gone_on_from(folder):
    for name in ("optimizer.pt", MANIFEST):
        (folder / "checkpoint-4" / name).unlink()
    for resume in ("latest", "auto", str(folder / "checkpoint-4")):
        with pytest.raises(RunError, match=r"there is no optimizer in .* \(save_only_model leaves it out\)"):
            choose_start(folder, A, resume)


def test_other_parameters_are_never_allowed(folder):
    settings = {**A, "lora_r": 16}
    run(folder, {**A, "lora_r": 8}, overwrite_run=True)
    for allow in (False, True):
        with pytest.raises(RunError, match=r"other parameters \(lora_r 8 -> 16\)") as error:
            choose_start(folder, settings, "latest", allow_changed_settings=allow)
        assert "--allow_changed_settings" not in str(error.value)


def test_a_run_that_went_on_with_changes_goes_on_again(folder):
    """It died before it had saved anything; its settings were allowed then."""
    begin_run(choose_start(folder, B, "auto", allow_changed_settings=True))
    assert choose_start(folder, B, "auto").checkpoint == str(folder / "checkpoint-4")
    with pytest.raises(RunError, match="holds another run"):
        choose_start(folder, A, "auto")


def test_no_weights_are_ones():
    assert compare({"reward_weights": None}, {"reward_weights": [1, 1.0]}) == []
    assert len(compare({"reward_weights": [1, 2]}, {"reward_weights": None})) == 1


@pytest.mark.parametrize("changes", [None, 5])
def test_changes_that_are_no_list(tmp_path, changes):
    (tmp_path / RUN_FILE).write_text(json.dumps({**A, CHANGED: changes}))
    assert read_run(tmp_path) == RunRecord(A)


def test_an_output_folder_without_a_name():
    with pytest.raises(RunError, match="--output_dir is empty"):
        choose_start("", A)
