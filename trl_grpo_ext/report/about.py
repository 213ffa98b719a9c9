"""What a trainer knows of its run, for the run's record: no secrets, and nothing of whose machine it is."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import is_torch_cuda_available

from ..embedded_policy import EMBEDDED_POLICY, embedded_policy_path
from ..private import without_credentials
from ..rewards.correctness import AnswerReward
from ..runs import settings_of
from ..versions import installed_versions
from .generations import RewardAbout


if TYPE_CHECKING:
    from trl import GRPOTrainer


def about_run(trainer: "GRPOTrainer", dataset_name: str | None = None) -> dict[str, Any]:
    """What is known of a run before its first step; see [`Run`] for who reads it.

    Args:
        trainer (`GRPOTrainer`):
            Its trainer. Settings that were asked for, in `trainer.run_record`, go before those of `trainer.args`.
        dataset_name (`str`, *optional*):
            What its data set is called; by default what the settings say.
    """
    recorded = getattr(trainer, "run_record", None)
    asked_for: Mapping[str, Any] = {} if recorded is None else recorded.settings
    settings = settings_of({**settings_of(trainer.args), **asked_for})
    device = trainer.accelerator.device.type
    about = {
        "model": name_of_model(trainer, settings.get("model_name_or_path")),
        "model_parameters": sum(map(_whole_size, trainer.model.parameters())),
        "dataset": about_dataset(trainer.train_dataset, dataset_name or asked_for.get("dataset_name")),
        "rewards": [asdict(reward) for reward in about_rewards(trainer)],
        "settings": settings,
        "versions": installed_versions(),
        "processes": trainer.accelerator.num_processes,
        "device": torch.cuda.get_device_name() if device == "cuda" and is_torch_cuda_available() else device,
        "threads": torch.get_num_threads(),
        "wrapper": type(trainer.model_wrapped).__name__,
        "fast_paths": about_fast_paths(trainer),
    }
    return {name: without_places(value) for name, value in about.items()}


def _whole_size(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # under ZeRO-3 a process may hold none of it


def name_of_model(trainer: "GRPOTrainer", asked_for: Any = None) -> str:
    """The policy's name on the hub, its folder, or `"embedded"`."""
    name = str(asked_for or getattr(trainer.model.config, "name_or_path", "") or type(trainer.model).__name__)
    return EMBEDDED_POLICY if name == embedded_policy_path() else name


def about_dataset(dataset: Any, name: Any = None) -> dict[str, Any]:
    """A data set's name, its number of rows, if it has one, and its columns."""
    try:
        rows = len(dataset)
    except TypeError:  # a stream
        rows = None
    columns = getattr(dataset, "column_names", None)
    return {"name": name, "rows": rows, "columns": list(columns) if isinstance(columns, list | tuple) else []}


def about_rewards(trainer: "GRPOTrainer") -> list[RewardAbout]:
    """What is known of a trainer's rewards. Of several with one name the later ones have a number behind it."""
    weights = trainer.reward_weights.tolist()
    names: list[str] = []
    for name in trainer.reward_func_names:
        numbered = (name if number == 1 else f"{name} ({number})" for number in itertools.count(1))
        names.append(next(candidate for candidate in numbered if candidate not in names))
    return [
        RewardAbout.of(function, weight, name)
        for function, weight, name in zip(trainer.reward_funcs, weights, names, strict=True)
    ]


def reference_column(reward_funcs: Any) -> str:
    """The column with which the answer rewards compare."""
    return next((reward.answer_column for reward in reward_funcs if isinstance(reward, AnswerReward)), "answer")


def about_fast_paths(trainer: "GRPOTrainer") -> dict[str, str]:
    """Which ways of saving time this trainer takes, and why not, as far as it knows."""
    return {"generation": who_generates(trainer), **getattr(trainer, "fast_paths", {})}


def who_generates(trainer: "GRPOTrainer") -> str:
    """By what completions are sampled."""
    if trainer.rollout_func is not None:
        return "rollout_func"
    if trainer.use_vllm:
        return f"vLLM ({trainer.vllm_mode})"
    return "transformers, continuous batching" if trainer.use_transformers_continuous_batching else "transformers"


def without_places(value: Any) -> Any:
    """A value whose texts name no home folder, no working directory and no credentials in an address."""
    if isinstance(value, str):
        return _without_places(value)
    if isinstance(value, Mapping):
        return {name: without_places(item) for name, item in value.items()}
    return [without_places(item) for item in value] if isinstance(value, list | tuple) else value


def _without_places(text: str) -> str:
    text = without_credentials(text)
    for place, name in ((Path.cwd(), ""), (Path(os.path.expanduser("~")), f"~{os.sep}")):
        if place != Path(place.anchor):  # "/" is in every path
            text = text.replace(f"{place}{os.sep}", name)
            if text == str(place):
                text = name.rstrip(os.sep) or "."
    return text
