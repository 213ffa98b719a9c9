"""What a run's own record costs: the demo's training with and without it.

    python scripts/measure_overhead.py                        # 3 seeds, each with, without, without, with; 15 minutes
    python scripts/measure_overhead.py --seeds 0 --steps 10

Trains the embedded policy with the settings of `recipes/configs/offline-tiny.yaml`, without evaluations, the four runs
of a seed one after another in an order in which a machine that becomes slower meets both sides alike. Both must end
with the same weights. Prints, of each seed, training time with the record over that without, and how long the
record's callback itself has worked. Other work on the machine makes these numbers worthless.
"""

import logging
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import Any

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging as hf_logging
from trl import TrlParser

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, RunRecordCallback
from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.rewards import gsm8k_bundle
from trl_grpo_ext.tasks import load_arithmetic


CONFIG = Path(__file__).resolve().parent.parent / "recipes" / "configs" / "offline-tiny.yaml"
# What is switched on and off together, of this package's settings.
SWITCHES = ("record_run", "diagnose")


@dataclass
class OverheadArguments:
    """What `measure_overhead.py` may be asked to change."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Four runs with each."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps of a run."})

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError("--steps must be at least 2: the first is not measured")


class Clock(TrainerCallback):
    """Time from the end of the first step, in which caches fill, to the end of training."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self._began = perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = perf_counter() - self._began


@dataclass
class Measured:
    """A run: seconds of its steps but the first, those of the record's callback, and the weights at the end."""

    seconds: float
    seconds_of_callback: float
    weights: dict[str, torch.Tensor]


def train(args: OverheadArguments, seed: int, records: bool) -> Measured:
    known = {item.name for item in fields(GRPOExtConfig)}
    settings: dict[str, Any] = {
        name: value for name, value in yaml.safe_load(CONFIG.read_text()).items() if name in known
    }
    settings |= {name: records for name in SWITCHES if name in known}
    bundle, clock = gsm8k_bundle(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings |= {"output_dir": folder, "max_steps": args.steps, "save_strategy": "no", "seed": seed}
        trainer = GRPOExtTrainer(
            model=embedded_policy_path(),
            reward_funcs=bundle,
            args=GRPOExtConfig(**settings, disable_tqdm=True),
            train_dataset=load_arithmetic("train", 4096, seed),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(clock)  # behind the record's
        trainer.train()
    records_of_run = [item for item in trainer.callback_handler.callbacks if isinstance(item, RunRecordCallback)]
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    return Measured(clock.seconds, sum(item.seconds for item in records_of_run), weights)


def main(argv: list[str]) -> None:
    (args,) = TrlParser([OverheadArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
    train(args, 0, records=True)  # nobody's: what is loaded and compiled once
    table = Table("seed", "without, s", "with, s", "ratio", "callback, ms a step", "of a step, %")
    ratios: list[float] = []
    for seed in args.seeds:
        order = (True, False, False, True) if len(ratios) % 2 == 0 else (False, True, True, False)
        runs = [train(args, seed, records) for records in order]
        for run in runs[1:]:
            if any(not weight.equal(runs[0].weights[name]) for name, weight in run.weights.items()):
                sys.exit(f"seed {seed}: runs with and without the record end with other weights")
        of: dict[bool, list[Measured]] = {True: [], False: []}
        for records, run in zip(order, runs, strict=True):
            of[records].append(run)
        seconds = {side: sum(run.seconds for run in found) for side, found in of.items()}
        own = sum(run.seconds_of_callback for run in of[True])
        ratios.append(seconds[True] / seconds[False])
        table.add_row(
            str(seed),
            *(f"{seconds[side] / 2:.2f}" for side in (False, True)),
            f"{ratios[-1]:.4f}",
            f"{1000 * own / 2 / args.steps:.2f}",
            f"{100 * own / seconds[True]:.2f}",
        )
    Console().print(table)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"training time with the record over that without: {mean:.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


if __name__ == "__main__":
    hf_logging.disable_progress_bar()  # of loading the policy
    logging.getLogger("trl_grpo_ext").setLevel(logging.ERROR)
    main(sys.argv[1:])
