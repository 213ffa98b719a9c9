"""A policy to be evaluated, from wherever it lies: the hub, a folder, an adapter, or a checkpoint of any trainer here.

DeepSpeed and FSDP may leave weights in shards. They are put together in memory, and without unpickling anything but
numbers: a checkpoint may come from somebody else.
"""

import hashlib
import io
import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ..checkpoints import find_missing, whole_checkpoints
from ..embedded_policy import EMBEDDED_POLICY, embedded_policy_path
from ..exits import one_line
from ..private import expand_home
from ..runs import RUN_FILE
from ..weights_only import METADATA, NotWeightsError, loading_only_weights, read_metadata, what_it_asks_for


WHOLE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FSDP_SHARDS, FSDP_WHOLE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"
# What a part of a model may fail with when it is read
FAILURES = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
MAX_BASES = 8  # an adapter's base may be an adapter, but not its own
# Of each file of weights, so many pieces of so many bytes tell it from another one
PIECES, BYTES_OF_PIECE = 64, 4096


class PolicyError(ValueError):
    """A model that cannot be had; the message is one line, and says what would help."""


@dataclass
class Policy:
    """A model and its tokenizer.

    Args:
        model (`PreTrainedModel`):
            The model, in evaluation mode; a PEFT model where there is an adapter.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def locate(name_or_path: str) -> str:
    """The name on the hub, or the folder with a model that is meant.

    A run's output folder is one once training has ended. Before that, it is the newest whole checkpoint in it.

    Raises:
        PolicyError: If there is no such folder, or no model in it.
    """
    if name_or_path == EMBEDDED_POLICY:
        return embedded_policy_path()
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        if path.is_file():
            raise PolicyError(f"{name_or_path} is a file: name the folder that it lies in")
        if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
            raise PolicyError(f"there is no folder {name_or_path}")
        return name_or_path
    if _has_weights(path):
        return str(path)
    whole, damages = whole_checkpoints(path)
    if whole:
        return str(whole[max(whole)])
    why = "; ".join(damages) or find_missing(path)
    raise PolicyError(f"there is no model in {name_or_path}: {why}")


def load_policy(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> Policy:
    """Load a model and its tokenizer.

    Args:
        name_or_path (`str`):
            A name on the hub, `"embedded"`, or a folder: a model, a LoRA adapter (its base is loaded from where the
            adapter says), a checkpoint of a trainer, under DeepSpeed and FSDP too, or the output folder of a run.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            What the weights are loaded in; `"auto"`: in what they were saved.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code that comes with the model.
        attn_implementation (`str`, *optional*):
            Transformers' name of an attention.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the model goes.

    Raises:
        PolicyError: If the model cannot be had.
    """
    place = locate(name_or_path)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _one_line_for(name_or_path):
        model = _load_model(place, {"dtype": dtype, "attn_implementation": attn_implementation, **options})
        tokenizer = load_tokenizer(place, **options)
    return Policy(model.to(device).eval(), tokenizer)


def load_tokenizer(place: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or that of the model which the folder's was made of."""
    for _ in range(MAX_BASES):
        path = Path(place)
        if not path.is_dir() or any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
            break
        place, options = _base_of(place, options)
    return AutoTokenizer.from_pretrained(place, **options)


@contextmanager
def _one_line_for(name: str) -> Iterator[None]:
    try:
        yield
    except PolicyError:
        raise
    except pickle.UnpicklingError as error:
        raise PolicyError(
            f"model {name!r} has more in its files than weights, which is not loaded, for it could be any program: "
            f"{what_it_asks_for(error)}"
        ) from error
    except FAILURES as error:
        cause = one_line(error) or type(error).__name__
        raise PolicyError(
            f"model {name!r} cannot be loaded. Without a network, name the folder of a downloaded model, or use the "
            f"embedded policy ({EMBEDDED_POLICY}). Cause: {cause}"
        ) from error


def _has_weights(folder: Path) -> bool:
    """Whether there are weights in a folder itself, or something of an adapter that says what is missing."""
    names = (*WHOLE_WEIGHTS, "adapter_config.json", FSDP_WHOLE, f"{FSDP_SHARDS}/*", "global_step*/*_states.pt")
    return any(path.is_file() for name in names for path in folder.glob(name))


def _adapter_config(place: str, revision: str | None = None) -> str | None:
    return find_adapter_config_file(place, revision=revision)


def _base_of(place: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where the model lies which an adapter or a checkpoint without a configuration was made of."""
    if _adapter_config(place, options.get("revision")) is not None:
        config = PeftConfig.from_pretrained(place, revision=options.get("revision"))
        name, revision = config.base_model_name_or_path, config.revision
    else:
        name = revision = None
        for folder in (Path(place), Path(place).parent):
            if (folder / RUN_FILE).is_file():
                settings = expand_home(yaml.safe_load((folder / RUN_FILE).read_text()))
                name, revision = settings.get("model_name_or_path"), settings.get("model_revision")
                break
    if not name:
        raise PolicyError(
            f"{place} does not say what model it was made of: put that model's config.json and tokenizer there"
        )
    try:
        base = locate(name)
    except PolicyError as error:
        raise PolicyError(f"{place} was made of {name!r}: {error}") from None
    if Path(base).exists() and Path(base).resolve() == Path(place).resolve():
        raise PolicyError(f"{place} says that it was made of itself: it is no adapter without its base")
    return base, {**options, "revision": None if Path(base).is_dir() else revision}


def _load_model(place: str, options: dict[str, Any], depth: int = 0) -> PreTrainedModel:
    path = Path(place)
    if depth > MAX_BASES:
        raise PolicyError(f"{place} is an adapter of an adapter of an adapter without end")
    if path.is_dir() and any((path / name).is_file() for name in WHOLE_WEIGHTS):
        return _check_loaded(place, AutoModelForCausalLM.from_pretrained(place, **options, output_loading_info=True))
    is_adapter = _adapter_config(place, options.get("revision")) is not None
    if is_adapter and (not path.is_dir() or _has_adapter_weights(path)):
        base, base_options = _base_of(place, options)
        model = _load_model(base, base_options, depth + 1)
        return PeftModel.from_pretrained(model, place, revision=options.get("revision"))
    if not path.is_dir():
        return _check_loaded(place, AutoModelForCausalLM.from_pretrained(place, **options, output_loading_info=True))
    state = _state_from_shards(path)
    if is_adapter:
        base, base_options = _base_of(place, options)
        model = get_peft_model(_load_model(base, base_options, depth + 1), PeftConfig.from_pretrained(place))
        _load_adapter_state(place, model, state)
        return model
    config = _config_of(place, options)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=options["trust_remote_code"]))
    loaded = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=config.dtype if options["dtype"] == "auto" else options["dtype"],
        attn_implementation=options["attn_implementation"],
        output_loading_info=True,
    )
    return _check_loaded(place, loaded)


def _config_of(place: str, options: dict[str, Any]) -> PreTrainedConfig:
    options = {name: options[name] for name in ("revision", "trust_remote_code")}
    for _ in range(MAX_BASES):
        if not Path(place).is_dir() or (Path(place) / "config.json").is_file():
            break
        place, options = _base_of(place, options)
    return AutoConfig.from_pretrained(place, **options)


def _check_loaded(place: str, loaded: tuple[PreTrainedModel, dict[str, Any]]) -> PreTrainedModel:
    """Weights that are not there are made up by transformers, with no more than a warning."""
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise PolicyError(f"{place} lacks weights of its model: {', '.join(missing[:3])}, {len(missing)} in all")
    return model


def _has_adapter_weights(folder: Path) -> bool:
    """Whether an adapter's file has weights: under ZeRO-3 one of empty tensors can lie beside the shards."""
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - no mapping
            return any(0 not in shape for shape in shapes)
    return (folder / "adapter_model.bin").is_file()


def _load_adapter_state(place: str, model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    wanted = {name for name in model.state_dict() if "lora_" in name}
    missing = sorted(wanted - state.keys())
    if missing:
        raise PolicyError(f"{place} lacks weights of its adapter: {', '.join(missing[:3])}, {len(missing)} in all")
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)


# Shards


def _state_from_shards(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that DeepSpeed or FSDP has left in shards."""
    if (folder / FSDP_SHARDS).is_dir():
        return _state_from_fsdp(folder / FSDP_SHARDS)
    if (folder / FSDP_WHOLE).is_file():
        return _without_wrapper(torch.load(folder / FSDP_WHOLE, map_location="cpu", weights_only=True))
    if any(folder.glob("global_step*/*_states.pt")):
        return _state_from_zero(folder)
    raise PolicyError(f"there are no weights in {folder}: {find_missing(folder) or 'no file of a known name'}")


def _without_wrapper(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return state["model"] if set(state) == {"model"} else state


def _state_from_fsdp(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `torch.distributed.checkpoint` has written, whose list of contents is a pickle."""
    metadata = folder / METADATA
    try:
        contents = read_metadata(metadata)
    except NotWeightsError as error:
        raise PolicyError(str(error)) from None
    others = [name for name, content in contents.items() if not isinstance(content, TensorStorageMetadata)]
    if others:
        raise PolicyError(f"{metadata} is not loaded: {str(others[0])[:60]!r} is no tensor")
    with tempfile.TemporaryDirectory() as scratch:
        file = os.path.join(scratch, "weights.pt")
        dcp_to_torch_save(folder, file)
        return _without_wrapper(torch.load(file, map_location="cpu", weights_only=True))


def _state_from_zero(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, in fp32, that DeepSpeed has written as each process's part."""
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError:
        raise PolicyError(
            f"the weights in {folder} are in DeepSpeed's shards: install deepspeed, or run its zero_to_fp32.py where "
            "it is installed"
        ) from None
    try:
        with loading_only_weights(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder)))
    except pickle.UnpicklingError as error:
        raise PolicyError(
            f"{folder} has more in it than weights, which is not loaded, for it could be any program "
            f"({what_it_asks_for(error)}): if the checkpoint is your own, run 'python {folder}/zero_to_fp32.py "
            f"{folder} DIR --safe_serialization', put config.json and tokenizer into DIR, and name DIR"
        ) from None


# What an evaluation notes of a model


def fingerprint(place: str) -> str | None:
    """What tells a folder's weights from others that may lie there later; `None` for a name on the hub.

    A hash of names, sizes, and pieces of each file of weights: training changes all of them.
    """
    folder = Path(place)
    if not folder.is_dir():
        return None
    names = [*WHOLE_WEIGHTS, *ADAPTER_WEIGHTS, "model-*.safetensors", "pytorch_model*.bin", f"{FSDP_SHARDS}/*"]
    files = sorted({file for name in [*names, "global_step*/*.pt"] for file in folder.glob(name) if file.is_file()})
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(json.dumps([file.relative_to(folder).as_posix(), size]).encode())
        with file.open("rb") as stream:
            for piece in range(PIECES):
                stream.seek(size * piece // PIECES)
                digest.update(stream.read(BYTES_OF_PIECE))
    return digest.hexdigest()[:16]


def is_whole_model(place: str, revision: str | None = None) -> bool:
    """Whether others can load what lies there: a name on the hub that is no adapter, or a folder with all weights."""
    path = Path(place)
    if path.is_dir():
        return any((path / name).is_file() for name in WHOLE_WEIGHTS) and (path / "config.json").is_file()
    return _adapter_config(place, revision) is None


def generation_config_of(place: str, revision: str | None = None) -> GenerationConfig | None:
    """A model's own generation settings; `None` if it has none."""
    try:
        return GenerationConfig.from_pretrained(place, revision=revision)
    except OSError:
        return None


def save_whole(policy: Policy, folder: str | os.PathLike[str]) -> str:
    """Write a policy as a folder that others can load, an adapter merged into its base; returns the folder."""
    model = policy.model.merge_and_unload() if isinstance(policy.model, PeftModel) else policy.model
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)
