"""Checkpoints that are whole or not there, and the newest whole one to go on from."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .mixin_order import OrderedMixin
from .ranks import is_lost_connection
from .rollouts import FOLDER as ROLLOUTS


logger = get_logger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
# Where a checkpoint is written before it gets its place. What begins with an underscore is not pushed to the hub.
ASIDE = "_incomplete"


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


def find_damage(folder: str | os.PathLike[str], *, with_rollouts: bool = True) -> str | None:
    """What a checkpoint lacks, as a sentence that names the file; `None` if it is whole.

    A checkpoint without a manifest was written by another trainer: it is taken to be whole if the trainer's state is
    there. So is one whose folder of rollouts has been deleted: the next step then generates.

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
        return None
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
    return None


def whole_checkpoints(output_dir: str | os.PathLike[str]) -> tuple[dict[int, Path], list[str]]:
    """The checkpoints in an output folder.

    Returns:
        `tuple[dict[int, Path], list[str]]`:
            Whole ones by their step, and what is wrong with the others.
    """
    found = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    damages = {step: find_damage(path) for step, path in found.items()}
    whole = {step: path for step, path in found.items() if damages[step] is None}
    return whole, [damage for damage in damages.values() if damage is not None]


class WholeCheckpointsMixin(OrderedMixin):
    """Checkpoints that are whole or not there, for any `trl.GRPOTrainer`; it goes before mixins that save themselves.

    A checkpoint is written to the folder `_incomplete`, and renamed when every process has written its part: what a
    killed run or a full disk leaves behind is never taken for a checkpoint. A manifest of its files and their sizes
    tells a later loss. `train(resume_from_checkpoint=True)` goes on from the newest checkpoint that is whole on every
    node, and says which ones it passed over; a folder that is named and not whole is refused.
    """

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
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_whole_checkpoint(self) -> str:
        folder = self.args.output_dir
        whole, damages = whole_checkpoints(folder)
        for damage in damages:
            logger.warning(f"A checkpoint is passed over: {damage}.")
        # Nodes may have a file system each: what counts is what all of them have.
        steps = set.intersection(*map(set, gather_object([list(whole)])))
        if not steps:
            raise CheckpointError(
                f"there is no whole checkpoint in {folder!r}"
                + (f" ({'; '.join(damages)})" if damages else "")
                + ": start afresh with resume_from_checkpoint=None"
            )
        return str(whole[max(steps)])

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._writes_aside else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside, place = run_dir / ASIDE / name, run_dir / name
        writes_for_node = self.accelerator.is_local_main_process
        try:
            if writes_for_node:
                shutil.rmtree(aside.parent, ignore_errors=True)  # what a killed run has left
            self.accelerator.wait_for_everyone()
            self._writes_aside = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writes_aside = False
            self._correct_best_checkpoint(aside, place)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                _put_in_place(aside, place)
            self.accelerator.wait_for_everyone()
            if writes_for_node and aside.exists():  # a node with a file system of its own
                _put_in_place(aside, place)
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
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

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


def _put_in_place(aside: Path, place: Path) -> None:
    """Write the manifest and rename, in place of what is there."""
    write_manifest(aside)
    if place.exists():
        os.rename(place, aside.with_name(f"replaced-{place.name}"))
    os.rename(aside, place)
    shutil.rmtree(aside.parent, ignore_errors=True)
