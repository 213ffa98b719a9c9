"""How much faster several processes are with rows dealt out over them: the same rollouts, the same weights.

    accelerate launch --config_file recipes/accelerate/ddp_cpu.yaml --num_processes 2 scripts/bench_ranks.py
    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 8 scripts/bench_ranks.py --bf16

Rollouts are made up, new ones for each generation: prompts of 100 to 200 tokens, 8 completions of 200 on average
(log-normal), and half of the groups are dead, whichever those are; so now and then a process has most of the work.
`GRPOExtTrainer` with `balance_ranks` on and off takes turns in the same processes. A ratio is only printed if both end
with the same weights; that these are those of `trl.GRPOTrainer` is what the tests say. On CPUs each process has one
thread; other work on the machine makes the times worthless.
"""

import copy
import json
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import torch
from accelerate import PartialState
from bench_update import MODELS, make_tokenizer, relative_difference
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from trl import GRPOTrainer, TrlParser

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.ranks import run_as_rank


SIDES: dict[str, dict[str, Any]] = {"own rows": {"balance_ranks": False}, "balanced": {"balance_ranks": True}}
TOLERANCE = 1e-4
NUM_GENERATIONS = 8


@dataclass
class RanksArguments:
    """What `bench_ranks.py` may be asked to change."""

    model: str = field(default="small", metadata={"help": "Shape of the model.", "choices": list(MODELS)})
    bf16: bool = field(default=False, metadata={"help": "Compute in half precision, on GPUs."})
    groups: int = field(default=2, metadata={"help": "Groups of 8 of a process and generation, a micro-batch each."})
    dead: float = field(default=0.5, metadata={"help": "Share of the groups that have no gradient."})
    num_iterations: int = field(default=4, metadata={"help": "Passes over each generation."})
    generations: int = field(default=4, metadata={"help": "Generations of a training."})
    repeats: int = field(default=3, metadata={"help": "Trainings with and without; the median counts."})
    seed: int = field(default=0, metadata={"help": "Seed of rollouts and weights."})
    output_file: Path | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})

    def __post_init__(self) -> None:
        for name in ("groups", "num_iterations", "generations", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dead < 1:
            raise ValueError(f"--dead must be at least 0 and below 1, got {self.dead}")


class Rollouts:
    """A `rollout_func` and a reward: other rows for each generation and process, the same in each training."""

    def __init__(self, args: RanksArguments, vocab_size: int, end: int) -> None:
        self.args, self.vocab_size, self.end = args, vocab_size, end
        self.generation = 0

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        rank = trainer.accelerator.process_index
        numbers = random.Random(f"{self.args.seed} {self.generation} {rank}")
        self.generation += 1

        def ids(length: int) -> list[int]:
            return [numbers.randrange(300, self.vocab_size) for _ in range(length)]

        of_prompts = {prompt: ids(numbers.randint(100, 200)) for prompt in dict.fromkeys(prompts)}
        lengths = [numbers.lognormvariate(math.log(200) - 0.6**2 / 2, 0.6) for _ in prompts]
        completions = [ids(min(511, max(1, round(length)))) + [self.end] for length in lengths]
        return {"prompt_ids": [of_prompts[each] for each in prompts], "completion_ids": completions, "logprobs": None}

    def reward(self, prompts: list[str], **kwargs: Any) -> list[float]:
        def is_dead(prompt: str) -> bool:
            return random.Random(f"{self.args.seed} {self.generation} {prompt}").random() < self.args.dead

        return [1.0 if is_dead(prompt) else float(index % 2) for index, prompt in enumerate(prompts)]


class Stopwatch(TrainerCallback):
    """Seconds of a training, from where all processes begin to where this one ends; all end together."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        self._began = self._now()

    def on_train_end(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        self.seconds = self._now() - self._began

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class Measured:
    """A training: its seconds, the weights that it has ended with, and the trainer's log."""

    seconds: float
    weights: list[torch.Tensor]
    log: list[dict[str, float]]

    def values(self, name: str) -> list[float]:
        return [entry[name] for entry in self.log if name in entry]


def make_model(args: RanksArguments) -> Any:
    set_seed(args.seed)
    config = copy.deepcopy(MODELS[args.model])  # trainers write into it
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(args: RanksArguments, side: str) -> Measured:
    tokenizer, watch = make_tokenizer(), Stopwatch()
    rollouts = Rollouts(args, MODELS[args.model].vocab_size, tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOExtTrainer(
            model=make_model(args),
            reward_funcs=rollouts.reward,
            args=GRPOExtConfig(
                **{
                    "output_dir": folder,
                    "max_steps": args.num_iterations * args.generations,
                    "per_device_train_batch_size": NUM_GENERATIONS,
                    "gradient_accumulation_steps": args.groups,
                    "num_generations": NUM_GENERATIONS,
                    "num_iterations": args.num_iterations,
                    "max_completion_length": 512,
                    "optim": "sgd",
                    "learning_rate": 1e-3,
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 1e9,
                    "use_cpu": not torch.cuda.is_available(),
                    "bf16": args.bf16,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": "none",
                    "seed": args.seed,
                    "record_run": False,
                    "shared_prefix": "on",
                    **SIDES[side],
                }
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"prompt {index}" for index in range(1024)]}),
            processing_class=tokenizer,
            rollout_func=rollouts,
            callbacks=[watch],
        )
        assert trainer.accelerator.num_processes == PartialState().num_processes
        for shown in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(shown)
        assert trainer.packs  # a comparison once in a training, which is no part of an update
        trainer.train()
        weights = [weight.detach().to("cpu", copy=True) for weight in trainer.model.parameters()]
    return Measured(watch.seconds, weights, trainer.state.log_history)


def figures_of(runs: dict[str, list[Measured]], start: list[torch.Tensor]) -> dict[str, Any]:
    """Seconds, how far the weights are apart, and what the exchange has taken."""
    expected = runs["own rows"][0].weights
    sides: dict[str, dict[str, Any]] = {
        side: {
            "seconds": [run.seconds for run in of_side],
            "median_s": statistics.median(run.seconds for run in of_side),
            "update_difference": relative_difference(of_side[0].weights, expected, start),
        }
        for side, of_side in runs.items()
    }
    last = runs["balanced"][-1]
    are_same = all(side["update_difference"] < TOLERANCE for side in sides.values())
    own, balanced = (sides[name]["median_s"] for name in SIDES)
    return {
        "sides": sides,
        "ratio": own / balanced if are_same else None,
        "exchange_share": sum(last.values("update/exchange_s")) / last.seconds,
        "exchange_mb": sum(last.values("update/exchange_mb")),
        "rows_moved": sum(last.values("update/rows_moved")),
        "slowest_rank_before": statistics.fmean(last.values("update/slowest_rank_unbalanced")),
        "slowest_rank": statistics.fmean(last.values("update/slowest_rank")),
    }


def show(figures: dict[str, Any], num_processes: int) -> None:
    table = Table("rows", "seconds", "all", "weights differ by", title=f"{num_processes} processes")
    for name, side in figures["sides"].items():
        each = ", ".join(f"{seconds:.2f}" for seconds in side["seconds"])
        table.add_row(name, f"{side['median_s']:.2f}", each, f"{side['update_difference']:.0e}")
    Console(width=None if sys.stdout.isatty() else 119).print(table)
    ratio = figures["ratio"]
    found = "weights differ" if ratio is None else f"{ratio:.2f} times as fast as with rows that stay"
    print(
        f"balanced: {found}; slowest rank over the mean {figures['slowest_rank_before']:.2f} before, "
        f"{figures['slowest_rank']:.2f} after; {figures['rows_moved']:.0f} rows moved, exchange "
        f"{figures['exchange_share']:.2%} of the time"
    )


def main(argv: list[str]) -> None:
    (args,) = TrlParser([RanksArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes == 1:
        sys.exit("error: one process has nobody to wait for: start it with accelerate launch --num_processes 2")
    if state.device.type == "cpu":
        torch.set_num_threads(1)
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES}
    turns = [side for _ in range(args.repeats) for side in SIDES]
    for side in tqdm(turns, unit="training", disable=not state.is_main_process):
        runs[side].append(train(args, side))
    if state.is_main_process:  # which has the log
        figures = figures_of(runs, [weight.detach() for weight in make_model(args).parameters()])
        show(figures, state.num_processes)
        if args.output_file is not None:
            args.output_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
