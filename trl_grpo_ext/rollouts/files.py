"""Rollouts in a checkpoint: a file of tensors and a file of all else, for each process."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


FORMAT = 2
FOLDER = "rollouts"


class RolloutError(ValueError):
    """Rollouts in a checkpoint that cannot be used; the message names the file and the remedy."""


def rollout_files(folder: str | os.PathLike[str], rank: int, num_ranks: int) -> tuple[Path, Path]:
    """The tensors' file and the state's file of a rank."""
    stem = Path(folder) / f"rank-{rank:05d}-of-{num_ranks:05d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def save_no_rollouts(folder: str | os.PathLike[str], rank: int, num_ranks: int, state: dict[str, Any]) -> None:
    """Write that there are no rollouts to go on with: the next step generates."""
    write_rollouts(folder, rank, num_ranks, {}, {"format": FORMAT, "micro_batches": None, **state})


def write_rollouts(
    folder: str | os.PathLike[str],
    rank: int,
    num_ranks: int,
    tensors: dict[str, torch.Tensor],
    content: dict[str, Any],
) -> None:
    """Write the rollouts of a process; an interrupted writer leaves what is known to be no whole pair of files."""
    tensors_file, state_file = rollout_files(folder, rank, num_ranks)
    tensors_file.parent.mkdir(parents=True, exist_ok=True)
    # The state goes last and knows the tensors' checksum: without it, or with another, the pair is not whole.
    save_file(tensors, tensors_file)
    content = {**content, "sha256": _checksum(tensors_file)}
    aside = state_file.with_suffix(".json.part")
    aside.write_text(json.dumps(content))
    os.replace(aside, state_file)


def read_rollouts(
    folder: str | os.PathLike[str], rank: int, num_ranks: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What [`write_rollouts`] wrote; raises [`RolloutError`] where it is not there, or not whole."""
    tensors_file, state_file = rollout_files(folder, rank, num_ranks)
    remedy = f"delete the folder {str(folder)!r} to go on from this checkpoint with fresh rollouts"
    for file in (state_file, tensors_file):
        if not file.is_file():
            raise RolloutError(f"{file} is missing; restore it, or {remedy}")
    try:
        content = json.loads(state_file.read_text())
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise RolloutError(f"{state_file} is no state of rollouts; restore it, or {remedy}") from error
    if found != FORMAT:
        raise RolloutError(f"{state_file} has format {found!r}, this version reads {FORMAT}; {remedy}")
    if content.get("sha256") != _checksum(tensors_file):
        raise RolloutError(f"{tensors_file} is damaged or not the one that was saved; restore it, or {remedy}")
    try:
        return load_file(tensors_file), content
    except (SafetensorError, OSError) as error:
        raise RolloutError(f"{tensors_file} cannot be read ({error}); restore it, or {remedy}") from error


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
