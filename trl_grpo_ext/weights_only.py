"""Checkpoints may come from somebody else: what is read of them is numbers, whoever reads it, and no program is run.

transformers, peft and accelerate load weights only, by themselves. DeepSpeed does not, nor does what
`torch.distributed.checkpoint` keeps beside FSDP's shards: for these there is [`loading_only_weights`].
"""

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .exits import one_line


METADATA = ".metadata"
# What `torch.distributed.checkpoint` describes a list of weights with
NAMES_OF_METADATA = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
    *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
)
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# Makes `torch.load` unpickle numbers and containers alone
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class NotWeightsError(ValueError):
    """A file of a checkpoint that has more in it than numbers; the message is one line, and names it."""


@contextmanager
def loading_only_weights() -> Iterator[None]:
    """Within it `torch.load` unpickles numbers and what DeepSpeed keeps beside them, whatever it is asked for."""
    before = os.environ.get(FORCE_WEIGHTS_ONLY)
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_of_deepspeed()):
            yield
    finally:
        if before is None:
            del os.environ[FORCE_WEIGHTS_ONLY]
        else:
            os.environ[FORCE_WEIGHTS_ONLY] = before


def _of_deepspeed() -> list[Any]:
    """Classes without code of their own that DeepSpeed keeps in its checkpoints, where it is installed."""
    with suppress(ImportError):
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
    return []


def read_metadata(file: Path) -> Mapping[str, Any]:
    """What `torch.distributed.checkpoint` says is in its files, by name.

    Raises:
        NotWeightsError: If the file, which is a pickle, holds anything else.
    """
    with file.open("rb") as stream:
        try:
            contents: Mapping[str, Any] = _OfMetadata(stream).load().state_dict_metadata
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise NotWeightsError(f"{file} is not loaded: {one_line(error)}") from None
    return contents


def check_metadata(folder: str | os.PathLike[str]) -> None:
    """[`read_metadata`] of each such file in a checkpoint: torch's own reader, which comes later, refuses nothing."""
    for file in sorted(Path(folder).rglob(METADATA)):
        read_metadata(file)


class _OfMetadata(pickle.Unpickler):
    """Reads what `torch.distributed.checkpoint` says of its files, and refuses whatever else a pickle can hold."""

    CLASSES = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in NAMES_OF_METADATA),
            *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
            *(("torch.serialization", "_get_layout"), ("torch", "Size"), ("collections", "OrderedDict")),
            *(("torch", dtype) for dtype in DTYPES),
            *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.CLASSES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a list of weights")
        return super().find_class(module, name)


def what_it_asks_for(error: pickle.UnpicklingError) -> str:
    """What a file asks for that is no number, out of torch's page of advice."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it asks for {found[1]}" if found else one_line(error)[:100]
