"""Checkpoints that are whole or not there, and the newest whole one to go on from."""

import ctypes
import json
import os
import pickle
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .mixin_order import OrderedMixin
from .ranks import is_lost_connection
from .rollouts import FOLDER as ROLLOUTS
from .weights_only import NotWeightsError, check_metadata, loading_only_weights, what_it_asks_for


logger = get_logger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
# Where a checkpoint is written before it gets its place: a folder of the trainer's own, because another one may be
# saving into the same output folder. What begins with an underscore is not pushed to the hub.
ASIDE = "_incomplete"
SECONDS_UNTIL_ABANDONED = 3600
# Where checkpoints of an earlier attempt lie until this one has written one.
EARLIER = "_earlier"

# Where weights and optimizer lie, as transformers, peft, FSDP and DeepSpeed name the files.
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.*", "*/adapter_model.*", "pytorch_model_fsdp_*/*", "global_step*/*model_states.pt"),
)
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*/*", "rank*-optimizer.pt", "global_step*/*optim_states.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or cannot be gone on from; the message names the file and the remedy."""


def write_manifest(folder: Path) -> None:
    """Note name and size of every file in a checkpoint that still lies aside, in its `manifest.json`."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def find_missing(folder: Path, parts: Iterable[str] = ("weights",)) -> str | None:
    """Which of the parts `"weights"`, `"optimizer"` and `"state"` is not in a checkpoint, as a sentence."""
    patterns = {"weights": WEIGHTS, "optimizer": OPTIMIZER, "state": (STATE,)}
    for part in parts:
        if not any(path.is_file() for pattern in patterns[part] for path in folder.glob(pattern)):
            what = {"weights": "are no weights", "optimizer": "is no optimizer", "state": f"is no {STATE}"}[part]
            return f"there {what} in {folder}"
    for index in sorted(folder.glob("*.index.json")) if "weights" in parts else ():
        try:
            files = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"{index} cannot be read"
        for name in sorted(files):
            if not (folder / name).is_file():
                return f"{folder / name} is missing"
    return None


def find_damage(folder: str | os.PathLike[str], *, with_rollouts: bool = True) -> str | None:
    """What a checkpoint lacks, as a sentence that names the file; `None` if it is whole.

    A checkpoint without a manifest was written by another trainer: it is taken to be whole if the trainer's state and
    weights are there. So is one whose folder of rollouts has been deleted: the next step then generates.

    Args:
        folder (`str` or `PathLike`):
            The checkpoint.
        with_rollouts (`bool`, *optional*, defaults to `True`):
            Look at the rollouts as well; reading them, [`RolloutBuffer.load`] looks closer.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        return f"{folder / STATE} is missing"
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return find_missing(folder)
    try:
        files = dict(json.loads(manifest.read_text())["files"])
    except (ValueError, KeyError, TypeError):
        return f"{manifest} cannot be read"
    for name, size in files.items():
        path = folder / name
        is_of_rollouts = Path(name).parts[0] == ROLLOUTS
        if is_of_rollouts and not (with_rollouts and (folder / ROLLOUTS).is_dir()):
            continue
        remedy = f" (without the folder {ROLLOUTS!r}, fresh rollouts are made)" if is_of_rollouts else ""
        if not path.is_file():
            return f"{path} is missing{remedy}"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size:,} bytes, and {size:,} were written{remedy}"
    return find_missing(folder)


def find_unresumable(folder: str | os.PathLike[str]) -> str | None:
    """Why a run cannot go on from a folder as if it had not stopped, as a sentence; `None` if it can."""
    damage, folder = find_damage(folder), Path(folder)
    if damage is not None or any(folder.glob("global_step*")):  # without ZeRO, DeepSpeed's optimizer has no own file
        return damage
    missing = find_missing(folder, ["optimizer"])
    return missing and f"{missing} (save_only_model leaves it out): the optimizer would start afresh"


def step_of(folder: str | os.PathLike[str]) -> int | None:
    """The step of a checkpoint: by its name, or under another one (a copy) by the trainer's state."""
    folder = Path(folder).resolve()
    step = _step_in_name(folder)
    if step is not None:
        return step
    try:
        return int(json.loads((folder / STATE).read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _step_in_name(folder: Path) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    return None if match is None else int(match[1])


def checkpoints(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """The checkpoints in an output folder by their step, whole or not."""
    return {
        step: path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (step := _step_in_name(path)) is not None
    }


def whole_checkpoints(output_dir: str | os.PathLike[str]) -> tuple[dict[int, Path], list[str]]:
    """The checkpoints in an output folder.

    Returns:
        `tuple[dict[int, Path], list[str]]`:
            Whole ones by their step, and what is wrong with the others.
    """
    found = checkpoints(output_dir)
    damages = {step: find_damage(path) for step, path in found.items()}
    whole = {step: path for step, path in found.items() if damages[step] is None}
    return whole, [damage for damage in damages.values() if damage is not None]


def newest_whole_checkpoint(output_dir: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole for every process, and what is wrong with others that this process sees.

    Nodes may have a file system each: what counts is what all of them have. All processes call it together.
    """
    whole, damages = whole_checkpoints(output_dir)
    steps = set.intersection(*map(set, gather_object([list(whole)])))
    return (whole[max(steps)] if steps else None), damages


class Record(Protocol):
    """What is noted of a run, see [`~trl_grpo_ext.runs.RunRecord`]."""

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a folder."""


class WholeCheckpointsMixin(OrderedMixin):
    """Checkpoints that are whole or not there, for any `trl.GRPOTrainer`; it goes before mixins that save themselves.

    A checkpoint is written to a folder `_incomplete-...` of this trainer's own, and renamed when every process has
    written its part: what a killed run or a full disk leaves behind is never taken for a checkpoint. A manifest of its
    files and their sizes tells a later loss; there is none unless weights, optimizer and trainer's state are among
    them. `train(resume_from_checkpoint=True)` goes on from the newest checkpoint that is whole on every node, and says
    which ones it passed over; a folder that is named and not whole is refused.

    A trainer that is given a `run_record` writes it into each checkpoint: see [`trl_grpo_ext.runs.begin_run`].
    """

    run_record: Record | None = None
    _aside_name: str | None = None
    _loading = ExitStack()
    _writes_aside = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_whole_checkpoint()
        elif resume_from_checkpoint:
            damage = find_damage(resume_from_checkpoint, with_rollouts=False)
            if damage is not None:
                raise CheckpointError(
                    f"checkpoint {str(resume_from_checkpoint)!r} is not whole: {damage}; restore it, or resume from "
                    "another one (True: the newest whole one)"
                )
        lacks = find_unresumable(resume_from_checkpoint) if resume_from_checkpoint else None
        if lacks is not None:
            logger.warning(f"Resuming from {str(resume_from_checkpoint)!r} alone: {lacks}.")
        if not resume_from_checkpoint:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        with ExitStack() as self._loading:
            self._loading.enter_context(_reading_numbers(resume_from_checkpoint))
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._loading.close()  # a reward of the user's may load what it likes

    def _newest_whole_checkpoint(self) -> str:
        newest, damages = newest_whole_checkpoint(self.args.output_dir)
        for damage in damages:
            logger.warning(f"A checkpoint is passed over: {damage}.")
        if newest is None:
            raise CheckpointError(
                f"there is no whole checkpoint in {self.args.output_dir!r}"
                + (f" ({'; '.join(damages)})" if damages else "")
                + ": start afresh with resume_from_checkpoint=None"
            )
        return str(newest)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, self._aside_folder()) if self._writes_aside else folder

    def _aside_folder(self) -> str:
        """The name of this trainer's folder for what is not whole yet, the same for all processes."""
        if self._aside_name is None:
            name = f"{ASIDE}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._aside_name = broadcast_object_list([name])[0]
        return self._aside_name

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, place = run_dir / self._aside_folder() / name, run_dir / name
        writes_for_node = self.accelerator.is_local_main_process
        try:
            if writes_for_node:
                remove_abandoned(run_dir)
                shutil.rmtree(aside.parent, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._writes_aside = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writes_aside = False
            self._correct_best_checkpoint(aside, place)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._put_in_place(aside, place)
            self.accelerator.wait_for_everyone()
            if writes_for_node and aside.exists():  # a node with a file system of its own
                self._put_in_place(aside, place)
        except Exception as error:
            if is_lost_connection(error):  # it is another rank that could not write
                raise
            shutil.rmtree(aside.parent, ignore_errors=True)  # if the disk is full, this makes room
            others = whole_checkpoints(run_dir)[0]
            raise CheckpointError(
                f"rank {self.accelerator.process_index} could not write checkpoint {str(place)!r} "
                f"({type(error).__name__}: {error}). "
                + (f"The newest whole one is {str(others[max(others)])!r}" if others else "There is no earlier one")
                + ": see that there is room in that folder, and resume"
            ) from error
        self.accelerator.wait_for_everyone()
        if writes_for_node:
            shutil.rmtree(run_dir / EARLIER, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        give_back_memory()

    def _put_in_place(self, aside: Path, place: Path) -> None:
        """Write the manifest and rename, in place of what is there."""
        if self.args.should_save:  # else this node's part has neither weights nor the trainer's state
            missing = find_missing(aside, ["weights", "state", *(["optimizer"] if self._saves_optimizer() else [])])
            if missing is not None:
                raise FileNotFoundError(missing)
        if self.run_record is not None:
            self.run_record.write(aside)
        write_manifest(aside)
        if place.exists():
            os.rename(place, aside.with_name(f"replaced-{place.name}"))
        os.rename(aside, place)
        shutil.rmtree(aside.parent, ignore_errors=True)

    def _saves_optimizer(self) -> bool:
        """Whether the optimizer has files of its own; without ZeRO, DeepSpeed has it in those of the model."""
        zero_stage = getattr(self.model_wrapped, "zero_optimization_stage", None)
        return not self.args.save_only_model and (zero_stage is None or zero_stage() > 0)

    def _correct_best_checkpoint(self, aside: Path, place: Path) -> None:
        """Where this checkpoint is the best one so far, let its state say where it will lie."""
        state: TrainerState = self.state
        if state.best_model_checkpoint == str(aside):
            state.best_model_checkpoint = str(place)
            if self.args.should_save:
                state.save_to_json(str(aside / STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writes_aside:  # else it is pushed when it lies in its place
            super()._push_from_checkpoint(checkpoint_folder)


@contextmanager
def _reading_numbers(checkpoint: str | os.PathLike[str]) -> Iterator[None]:
    """Within it nothing but numbers is read of a checkpoint; what else it holds raises [`CheckpointError`]."""
    try:
        check_metadata(checkpoint)
        with loading_only_weights():
            yield
    except NotWeightsError as error:
        raise CheckpointError(str(error)) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} has more in it than numbers, which is not loaded, for it could be any "
            f"program ({what_it_asks_for(error)}): restore it, or resume from another one"
        ) from error


def give_back_memory() -> None:
    """Give freed memory back to the operating system, where the C library can (glibc); milliseconds.

    Small things that stay, such as the trainer's log, come to lie between large ones that are freed, and glibc gives
    back only what lies behind the last of them: a run on CPUs would slowly take up memory that it does not use.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def remove_abandoned(run_dir: Path) -> None:
    """Remove what trainers that are gone have left of checkpoints they were writing.

    On this machine a trainer is gone when its process is. On another one it is taken to be gone when it has written
    nothing for an hour. A folder that names no trainer is of nobody who is running.
    """
    for folder in run_dir.glob(f"{ASIDE}*"):
        owner = re.fullmatch(rf"{ASIDE}-(.+)-(\d+)-\w+", folder.name)
        if owner is None:
            is_abandoned = True
        elif owner[1] == socket.gethostname():
            is_abandoned = not _is_running(int(owner[2]))
        else:
            is_abandoned = _newest_change(folder) < time.time() - SECONDS_UNTIL_ABANDONED
        if is_abandoned:
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _newest_change(folder: Path) -> float:
    times = [0.0]
    for path in [folder, *folder.rglob("*")]:
        with suppress(OSError):  # it has just been removed
            times.append(path.stat().st_mtime)
    return max(times)
