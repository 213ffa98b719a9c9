"""What makes a run this run: its settings, kept beside its results, and which of them may change when it goes on.

A run's settings lie in `run.yaml`, in its output folder and in each of its checkpoints. The file is a configuration:
`--config run.yaml` starts the script with it again. [`choose_start`] holds a run's settings against what is there, so
that no run starts in another one's folder or goes on from another one's checkpoint; [`BeginRun`] notes them there
when training begins.

```python
others = {"model": model_name, "dataset": dataset_name, "rewards": dict(zip(bundle.names, bundle.weights))}
start = choose_start(args.output_dir, settings_of(args, others), resume="auto")
trainer.run_record = start.record  # for its checkpoints
trainer.add_callback(BeginRun(start))
trainer.train(resume_from_checkpoint=start.checkpoint)
```
"""

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import TrainerCallback

from .checkpoints import (
    ASIDE,
    EARLIER,
    STATE,
    checkpoints,
    find_damage,
    find_missing,
    find_unresumable,
    newest_whole_checkpoint,
    step_of,
)
from .private import expand_home, is_secret, shorten_home, without_credentials


RUN_FILE = "run.yaml"
# What the file says besides settings: where a run went on with other ones.
CHANGED = "changed_settings"

# Settings that may change within a run. Where and how often something is said, looked at or kept:
_REPORTS = (
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub"),
    *("logging_", "log_", "hub_", "trackio_", "save_", "enable_jit_checkpoint", "num_completions_to_print"),
    *("eval_", "per_device_eval_batch_size", "num_generations_eval", "do_", "debug", "skip_memory_metrics"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "include_num_input_tokens_seen"),
    *("check_references", "record_run", "diagnose"),
)
# How long it goes on (a rate that falls to 0 at the end of a run then falls otherwise):
_LENGTH = ("max_steps", "num_train_epochs", "max_minutes")
# Where the same numbers are computed, and with how much memory and time:
_MACHINE = (
    *("cpu_threads", "local_rank", "ddp_", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_empty_cache_steps", "shared_prefix"),
    *("vllm_server_", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"),
    *("vllm_enable_sleep_mode", "ds3_gather_for_generation"),
)
# Names that end in an underscore stand for all that begin with them.
HARMLESS = (*_REPORTS, *_LENGTH, *_MACHINE)
# They begin as names above do, but decide what is trained on: rows that are held out of a file are not in it.
NOT_HARMLESS = ("eval_items", "eval_dataset_name")

# They decide which parameters there are: with others, a checkpoint's cannot be loaded.
PARAMETERS = (
    "model_name_or_path",
    "model_revision",
    "model",
    "use_peft",
    "lora_",
    "use_rslora",
    "use_dora",
    "load_in_",
)

# How a run is started is not what it is.
_HOW_TO_START = ("resume_from_checkpoint", "overwrite_run", "allow_changed_settings", "config")


class RunError(RuntimeError):
    """A run that must not begin in this folder, or from this checkpoint; the message is one line with what to do."""


@dataclass(frozen=True)
class Change:
    """A setting that is another one than it was."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} {self.old!r} -> {self.new!r}"


@dataclass
class RunRecord:
    """What `run.yaml` says.

    Args:
        settings (`dict[str, Any]`):
            The settings, by name.
        changes (`list[dict[str, Any]]`):
            For each time that the run went on with other settings: from which `checkpoint`, and of each of the
            `settings` its old and its new value.
    """

    settings: dict[str, Any]
    changes: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the file, at once or not at all."""
        file = Path(folder) / RUN_FILE
        content = shorten_home({**self.settings, **({CHANGED: self.changes} if self.changes else {})})
        part = file.with_name(f".{RUN_FILE}.{os.getpid()}")
        part.write_text(
            "# The settings of the run in this folder; --config and this file start it again.\n"
            + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000),
            encoding="utf-8",
        )
        part.replace(file)


@dataclass
class Start:
    """How a run begins.

    Args:
        folder (`Path`):
            The run's output folder.
        record (`RunRecord`):
            What is noted of it: give it to the trainer, as its `run_record`.
        checkpoint (`str`, *optional*):
            What it goes on from; `None` if it starts afresh.
        notes (`list[str]`):
            What the user is to know.
        stale (`list[Path]`):
            Checkpoints in its folder that it does not build on.
    """

    folder: Path
    record: RunRecord
    checkpoint: str | None = None
    notes: list[str] = field(default_factory=list)
    stale: list[Path] = field(default_factory=list)


def settings_of(*sources: Any) -> dict[str, Any]:
    """Settings that can be written to a file and read back.

    Tokens and passwords are left out, also those in addresses; objects that a configuration file cannot hold; and how
    the run is started.

    Args:
        *sources (mappings or dataclasses):
            Settings by name. Training arguments are dataclasses that have filled in some fields from others and from
            the number of processes; a mapping of what was asked for, such as [`OneLineParser.given`], is better.
    """
    settings: dict[str, Any] = {}
    for source in sources:
        if is_dataclass(source):
            source = {item.name: getattr(source, item.name) for item in fields(source) if item.init}
            if source.get("steps_per_generation") is not None:
                source.pop("generation_batch_size", None)  # computed from it, and TRL refuses both
        for name, value in source.items():
            if name not in _HOW_TO_START and not is_secret(name):
                try:
                    settings[name] = _plain(value)
                except TypeError:
                    continue
    return dict(sorted(settings.items()))


def _plain(value: Any) -> Any:
    """A value in the types that yaml knows; raises `TypeError` if it cannot be had."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, str) and value.lstrip().startswith("{"):  # as dictionaries are given on a command line
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if type(value) is str:
        return without_credentials(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_dict"):  # an `AcceleratorConfig`
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if not is_secret(str(name))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be written")


def is_harmless(name: str) -> bool:
    """Whether a run stays the same run when this setting changes."""
    return name not in NOT_HARMLESS and _is_one_of(name, HARMLESS)


def _is_one_of(name: str, known_names: Iterable[str]) -> bool:
    return any(name.startswith(known) if known.endswith("_") else name == known for known in known_names)


def _is_same(name: str, old: Any, new: Any) -> bool:
    if name == "reward_weights":  # without any, each is 1
        old, new = ([1.0] * len(other or ()) if value is None else value for value, other in ((old, new), (new, old)))
    return bool(old == new)


def compare(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[Change]:
    """The changes that make of one run another one.

    A setting that only one side has is one that the other side's version of TRL or this package does not know.
    """
    return [
        Change(name, recorded[name], present[name])
        for name in sorted(recorded.keys() & present.keys())
        if not _is_same(name, recorded[name], present[name]) and not is_harmless(name)
    ]


def read_run(folder: str | os.PathLike[str]) -> RunRecord | None:
    """What is noted of the run in an output folder, or of the one that wrote a checkpoint; `None` if nothing is."""
    file = Path(folder) / RUN_FILE
    try:
        content = expand_home(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise RunError(f"{str(file)!r} cannot be read ({cause}): restore or delete it") from error
    if not isinstance(content, dict):
        raise RunError(f"{str(file)!r} holds no settings: restore or delete it")
    changes = content.pop(CHANGED, None)
    return RunRecord(content, changes if isinstance(changes, list) else [])


def choose_start(
    output_dir: str | os.PathLike[str],
    settings: dict[str, Any],
    resume: str | bool | None = None,
    *,
    overwrite_run: bool = False,
    allow_changed_settings: bool = False,
) -> Start:
    """How a run begins, from what lies in its folder; raises [`RunError`] if it must not, and changes nothing.

    Among several processes all of them call it, after the training arguments have been made.

    Args:
        output_dir (`str` or `PathLike`):
            The run's folder.
        settings (`dict[str, Any]`):
            The run's settings, by [`settings_of`].
        resume (`str` or `bool`, *optional*):
            A checkpoint to go on from; `"latest"` or `True` for the newest whole one in the folder; `"auto"` for that
            one if the folder is this run's, or a fresh start if it is empty; `None` to start afresh.
        overwrite_run (`bool`, *optional*, defaults to `False`):
            Start afresh even if another run is in the folder.
        allow_changed_settings (`bool`, *optional*, defaults to `False`):
            Go on from a checkpoint even if this makes it another run; the change is noted.
    """
    if not os.fspath(output_dir):
        raise RunError("--output_dir is empty: name a folder")
    folder, record = Path(output_dir), RunRecord(settings)
    _check_writable(folder)
    wanted = None if str(resume).lower() in ("", "none", "false") else str(resume)
    in_folder = None if _is_untrained(folder) else read_run(folder)
    changes = compare(in_folder.settings, settings) if in_folder is not None else []
    is_same = in_folder is not None and not changes
    newest, damages = newest_whole_checkpoint(folder)
    passed_over = [f"a checkpoint is passed over: {damage}" for damage in damages]
    if wanted is not None and wanted.lower() == "auto":
        goes_on = is_same or (allow_changed_settings and not overwrite_run)
        wanted = "latest" if newest is not None and goes_on else None

    if wanted is None:
        _check_folder(folder, in_folder, changes, overwrite_run)
        start = Start(folder, record, stale=list(checkpoints(folder).values()))
        if in_folder is not None or start.stale:
            which = "the same" if is_same else "another"
            start.notes.append(f"{which} run was in {str(folder)!r}; this one starts afresh")
    elif wanted.lower() in ("latest", "true"):
        if newest is None:
            found = "; ".join(damages) or "leave it out to start afresh"
            raise RunError(f"--resume_from_checkpoint: there is no checkpoint in {str(folder)!r}; {found}")
        start = _go_on(folder, newest, settings, allow_changed_settings, in_folder)
        start.notes[:0] = passed_over
    else:
        if Path(wanted).resolve() == folder.resolve():
            raise RunError(
                f"--resume_from_checkpoint: {wanted!r} is the output folder: name one of its checkpoints, or 'latest'"
            )
        damage = find_damage(wanted)
        if damage is not None:
            raise RunError(f"--resume_from_checkpoint: {wanted!r} is no whole checkpoint: {damage}")
        if Path(wanted).resolve().parent != folder.resolve():
            _check_folder(folder, in_folder, changes, overwrite_run)
        start = _go_on(folder, Path(wanted), settings, allow_changed_settings, in_folder)
    if start.stale:
        names = ", ".join(sorted(path.name for path in start.stale))
        start.notes.append(f"{names}: set aside in {str(folder / EARLIER)!r} until this run has saved a checkpoint")
    return start


def _is_untrained(folder: Path) -> bool:
    """Whether the run that has begun in a folder has left nothing that another one could spoil."""
    parts = (STATE, "summary.json", EARLIER)
    return not (
        checkpoints(folder)
        or any(folder.glob(f"{ASIDE}*"))
        or any((folder / part).exists() for part in parts)
        or find_missing(folder) is None
    )


def _go_on(
    folder: Path,
    checkpoint: Path,
    settings: dict[str, Any],
    allow_changed_settings: bool,
    in_folder: RunRecord | None,
) -> Start:
    """A start from a checkpoint, if it is this run's."""
    lacks = find_unresumable(checkpoint)
    if lacks is not None:
        raise RunError(
            f"--resume_from_checkpoint: {str(checkpoint)!r} is no checkpoint to go on from: {lacks}; name another "
            "one, or start afresh with it as --model_name_or_path in another --output_dir"
        )
    step = step_of(checkpoint) if checkpoint.resolve().parent == folder.resolve() else None
    stale = [path for at, path in checkpoints(folder).items() if step is None or at > step]
    start = Start(folder, RunRecord(settings), str(checkpoint), [f"goes on from {str(checkpoint)!r}"], stale)
    before = read_run(checkpoint)
    if before is None:
        start.notes.append(f"{str(checkpoint)!r} has no {RUN_FILE}: whether it is of this run cannot be told")
        return start
    start.record.changes = list(before.changes)
    changes = compare(before.settings, settings)
    if any(_is_one_of(change.name, PARAMETERS) for change in changes):
        raise RunError(
            f"{str(checkpoint)!r} is of a run with other parameters ({_listed(changes)}): set them back, or start "
            "afresh in another --output_dir"
        )
    if changes and not allow_changed_settings and not _has_gone_on(in_folder, checkpoint, settings):
        raise RunError(
            f"{str(checkpoint)!r} is of a run with other settings ({_listed(changes)}): set them back, start afresh "
            "in another --output_dir, or go on with the new ones: --allow_changed_settings true"
        )
    if changes:
        start.notes.append(f"with other settings than {str(checkpoint)!r}: {_listed(changes)}")
        start.record.changes.append(
            {"checkpoint": str(checkpoint), "settings": {item.name: [item.old, item.new] for item in changes}}
        )
    return start


def _has_gone_on(in_folder: RunRecord | None, checkpoint: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder's run went on from this checkpoint with these settings, and has saved nothing since."""
    if in_folder is None or not in_folder.changes or compare(in_folder.settings, settings):
        return False
    last = in_folder.changes[-1]
    return isinstance(last, Mapping) and last.get("checkpoint") == str(checkpoint)


def _check_folder(folder: Path, in_folder: RunRecord | None, changes: list[Change], overwrite_run: bool) -> None:
    """Refuse to start in a folder that is another run's."""
    if overwrite_run:
        return
    ways = "choose another --output_dir, or put this one in its place: --overwrite_run true"
    if changes:
        raise RunError(f"{str(folder)!r} holds another run ({_listed(changes)}): {ways}")
    if in_folder is None and checkpoints(folder):
        raise RunError(
            f"{str(folder)!r} holds checkpoints of a run whose settings were not recorded: go on from them "
            f"(--resume_from_checkpoint latest), {ways}"
        )


def _check_writable(folder: Path) -> None:
    """Say early what [`begin_run`] would run into."""
    parent = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"nothing can be written to {str(parent)!r}: choose another --output_dir")


def _listed(changes: list[Change]) -> str:
    return ", ".join(map(str, changes))


def begin_run(start: Start) -> None:
    """Note a run's settings in its folder, and set aside what it does not build on.

    Checkpoints of an earlier attempt, from which a later one must not go on, are moved to the folder `_earlier`, which
    is deleted when the trainer has written one itself. Among several processes all of them call it together.
    """
    state = PartialState()
    state.wait_for_everyone()  # until all have looked, and found the same
    if state.is_main_process:
        _prepare(start)
    state.wait_for_everyone()
    if state.is_local_main_process and not state.is_main_process:  # a node with a file system of its own
        _prepare(start)
    state.wait_for_everyone()


def _prepare(start: Start) -> None:
    try:
        start.folder.mkdir(parents=True, exist_ok=True)
        for path in start.stale:
            if path.exists():
                _set_aside(path, start.folder / EARLIER)
        start.record.write(start.folder)
    except OSError as error:
        raise RunError(
            f"nothing can be written to {str(start.folder)!r} ({error.strerror or error}): choose another --output_dir"
        ) from error


def _set_aside(path: Path, earlier: Path) -> None:
    """Move a checkpoint beside those of still earlier attempts: one of them may be what this run goes on from."""
    others = (earlier / f"attempt-{number}" for number in itertools.count(2))
    folder = next(one for one in itertools.chain([earlier], others) if not os.path.lexists(one / path.name))
    folder.mkdir(parents=True, exist_ok=True)
    path.rename(folder / path.name)


class BeginRun(TrainerCallback):
    """Calls [`begin_run`] when training begins: the checkpoint to go on from has been loaded by then.

    Args:
        start ([`Start`]):
            How the run begins, by [`choose_start`].
    """

    def __init__(self, start: Start) -> None:
        self.start = start

    def on_train_begin(self, args, state, control, **kwargs):
        begin_run(self.start)
