"""Train on canned rollouts in processes of their own: `python run_canned.py SETTINGS.json`. They can kill themselves.

The settings are those of one run, or `{"runs": [...]}`; `resume` is a checkpoint, or true for the newest one. A run
leaves its weights in `final.safetensors`, and what each process ran on and saw in `rank-N.json`.
"""

import functools
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from canned import KINDS, Run, canned_config, canned_prompts, canned_reward, train_canned
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.evaluation import EvaluationCallback
from trl_grpo_ext.ranks import BoundCollectiveCalls, run_as_rank
from trl_grpo_ext.trainer import GRPOExtTrainer


RANK = int(os.environ.get("RANK", "0"))
COUNTS: Counter[str] = Counter()  # of the run's collective calls


class Kill(TrainerCallback):
    """End this process as a machine that fails does: at once, and without a word."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            os.kill(os.getpid(), signal.SIGKILL)


class Stay(TrainerCallback):
    """At a step, write this process's id to a file and stay there, as if the step took long."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            Path(args.output_dir, f"rank-{RANK}.pid").write_text(str(os.getpid()))
            signal.pause()


def reward_that_fails(prompts, completion_ids, **kwargs):
    raise ZeroDivisionError("this reward cannot divide")


def reward_of_a_dead_rank(prompts, completion_ids, **kwargs):
    return [1.0] * len(prompts)


CALLS = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
)


def count_calls() -> None:
    """Count the collective calls of this process from now on, but for those that wrappers make in C++."""

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            COUNTS[name] += 1
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(distributed, name, counted(name, getattr(distributed, name)))


def shard_on_cpus() -> None:
    """Let accelerate take FSDP's configuration on CPUs, where it otherwise makes DDP of it, without a word.

    It has a list of devices for FSDP, on which CPUs are not; torch's `fully_shard` and gloo can do it.
    """
    initialize = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def sharding_of_torch(model: Any) -> dict[str, Any]:
    """How many numbers of the weights this process holds, and how many there are."""
    parameters = list(model.parameters())
    return {
        "kind": "fully_shard",
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "parameters": len(parameters),
        "weights": sum(
            parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
            for parameter in parameters
        ),
        "all_weights": sum(parameter.numel() for parameter in parameters),
    }


def with_images_on(rank: int, trainer_class: type) -> type:
    """A trainer whose micro-batches on one process say how many images they have, as if there were any."""

    class Seeing(trainer_class):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return {**output, "num_images": [0] * len(inputs)} if rank == RANK else output

    return Seeing


def with_evaluations(trainer_class: type) -> type:
    """A trainer that evaluates: on its own, and on problems, of which there is an odd number."""
    problems = Dataset.from_dict({"prompt": ["a", "b b b", "c c"], "answer": [1, 2, 3]})

    class Evaluating(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=canned_prompts(num_prompts=4), **kwargs)
            self.evaluation = EvaluationCallback(self, problems, samples_per_item=2, batch_size=2)
            self.add_callback(self.evaluation)

    return Evaluating


def offload_device(offload: Any) -> str:
    """Where DeepSpeed's configuration says that something is kept: "cpu", or "none" for where it would be anyway."""
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))


def sharding(engine: Any) -> dict[str, Any]:
    """How DeepSpeed says that a model is shared out, and how many numbers this process really holds."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    parts = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    parameters = list(engine.module.parameters())
    weights = [parameter.ds_tensor if stage == 3 else parameter for parameter in parameters]
    sizes = [parameter.ds_numel if stage == 3 else parameter.numel() for parameter in parameters]
    return {
        "stage": stage,
        "weights": sum(weight.numel() for weight in weights),
        "all_weights": sum(sizes),
        "trained": sum(part.numel() for part in parts),
        "all_trained": sum(size for parameter, size in zip(parameters, sizes, strict=True) if parameter.requires_grad),
        "dtype": str(weights[0].dtype),
        "optimizer": type(engine.basic_optimizer).__name__,
        "optimizer_device": offload_device(engine.zero_offload_optimizer()),
        "weights_device": offload_device(engine.zero_offload_param()),
    }


def leave_behind(run: Run, folder: Path) -> None:
    accelerator = run.trainer.accelerator
    wrapped = run.trainer.model_wrapped
    ran_on = {
        "processes": accelerator.num_processes,
        "wrapper": type(wrapped).__name__,
        "packs": getattr(run.trainer, "packs", False),
        "forwards": [[forward.tokens, forward.has_gradient] for forward in run.forwards],
        "log": run.log,
        "calls": dict(COUNTS),
        "evaluated": sorted(run.trainer.evaluation.history) if hasattr(run.trainer, "evaluation") else None,
        "sharding": sharding(wrapped) if hasattr(wrapped, "zero_optimization_stage") else None,
    }
    if isinstance(wrapped, FSDPModule):
        ran_on["sharding"] = sharding_of_torch(wrapped)
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(ran_on))
    if accelerator.is_main_process:
        save_file(run.start, folder / "start.safetensors")
        save_file(run.weights, folder / "final.safetensors")


def train(settings: dict[str, Any], callbacks: Sequence[TrainerCallback]) -> Run:
    options = {"peft_config": LoraConfig(r=2, init_lora_weights=False)} if settings.get("lora") else {}
    classes = (GRPOTrainer, GRPOConfig) if settings.get("trainer") == "trl" else (GRPOExtTrainer, GRPOExtConfig)
    trainer_class = classes[0]
    if "images_on" in settings:
        trainer_class = with_images_on(settings["images_on"], trainer_class)
    if settings.get("evaluates"):
        trainer_class = with_evaluations(trainer_class)
    callbacks = [*callbacks, BoundCollectiveCalls()]
    if RANK in settings.get("kill_ranks", [RANK]) and "kill_at" in settings:
        callbacks.append(Kill(settings["kill_at"]))
    if RANK in settings.get("stay_ranks", [RANK]) and "stay_at" in settings:
        callbacks.append(Stay(settings["stay_at"]))
    reward = reward_that_fails if settings.get("reward_fails_on") == RANK else canned_reward
    if RANK in settings.get("dead_ranks", []):
        reward = reward_of_a_dead_rank
    if "lengths_of_ranks" in settings:
        options["lengths"] = settings["lengths_of_ranks"][RANK]
    COUNTS.clear()
    run = train_canned(
        trainer_class,
        canned_config(settings["output_dir"], classes[1], **settings["options"]),
        settings["policy"],
        kinds=settings.get("kinds", KINDS),
        sampler_noise=settings.get("sampler_noise"),
        resume=settings.get("resume"),
        reward=reward,
        callbacks=callbacks,
        **options,
    )
    leave_behind(run, Path(settings["output_dir"]))
    return run


def main(settings: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()) -> None:
    torch.set_num_threads(1)
    count_calls()
    if settings.get("shards_on_cpus"):
        shard_on_cpus()
    for settings_of_run in settings.get("runs", [settings]):
        run = train(settings_of_run, callbacks)
        run.trainer.accelerator.wait_for_everyone()  # a rank that is gone early can leave the other one waiting


if __name__ == "__main__":
    run_as_rank(main, json.loads(Path(sys.argv[1]).read_text()))
