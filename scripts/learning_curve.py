"""How fast the offline recipe learns: accuracy against training time and against generated completions.

    python scripts/learning_curve.py                                          # four variants, three seeds, 18 minutes
    python scripts/learning_curve.py --variants mu1 mu4 --seeds 0 --train_seconds 30

Trains the embedded policy with the settings of `recipes/configs/offline-tiny.yaml`, at a constant learning rate, once
for each variant and seed, taking turns so that a slow minute of the machine meets all of them. The clock stands still
during evaluation. Writes `learning_curve.json` and `learning_curve.png` to the output folder and prints a table of
what it took to reach the target accuracy.
"""

import itertools
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging as hf_logging
from trl import GRPOTrainer, TrlParser

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.evaluation import evaluate
from trl_grpo_ext.rewards import gsm8k_bundle
from trl_grpo_ext.tasks import load_arithmetic


# TRL and transformers still use the old names between themselves.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of {total:.0f} s of training [{elapsed} in all]"

CONFIG = Path(__file__).resolve().parent.parent / "recipes" / "configs" / "offline-tiny.yaml"

# A trainer, and what it changes in the recipe's settings.
VARIANTS: dict[str, tuple[type[GRPOTrainer], dict[str, Any]]] = {
    "trl-mu1": (GRPOTrainer, {"num_iterations": 1, "target_kl": None}),
    "trl-mu2": (GRPOTrainer, {"num_iterations": 2, "target_kl": None}),
    "trl-mu4": (GRPOTrainer, {"num_iterations": 4, "target_kl": None}),
    "mu1": (GRPOExtTrainer, {"num_iterations": 1, "target_kl": None}),
    "mu2": (GRPOExtTrainer, {"num_iterations": 2, "target_kl": None}),
    "mu4": (GRPOExtTrainer, {"num_iterations": 4, "target_kl": None}),
    "mu4-kl": (GRPOExtTrainer, {"num_iterations": 4, "target_kl": 0.01}),
}


@dataclass
class CurveArguments:
    """What `learning_curve.py` may be asked to change."""

    variants: list[str] = field(
        default_factory=lambda: ["mu1", "mu2", "mu4", "mu4-kl"],
        metadata={"help": f"What to compare, of {', '.join(VARIANTS)}."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Each variant runs with all."})
    train_seconds: float = field(default=45.0, metadata={"help": "Training time of a run; evaluations do not count."})
    eval_seconds: float = field(default=4.5, metadata={"help": "Training time between two evaluations."})
    eval_items: int = field(default=200, metadata={"help": "Held-out problems of an evaluation."})
    eval_samples: int = field(default=2, metadata={"help": "Samples for each of them."})
    target: float = field(default=0.8, metadata={"help": "Sampled accuracy to reach."})
    stop_at_target: bool = field(default=False, metadata={"help": "End a run when it has reached the target."})
    learning_rate: float | None = field(default=None, metadata={"help": "Default: the recipe's."})
    shared_prefix: str = field(
        default="auto", metadata={"help": "Of our trainer; 'off' updates as TRL does.", "choices": ["auto", "off"]}
    )
    output_dir: Path = field(default=Path("outputs/learning_curve"), metadata={"help": "Where the results go."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ValueError(f"--variants: {unknown} are unknown, choose from {list(VARIANTS)}")
        for name in ("train_seconds", "eval_seconds", "eval_items", "eval_samples"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Point:
    """An evaluation: after so many seconds of training and so many generated completions."""

    seconds: float
    completions: int
    sampled: float
    greedy: float


class Curve(TrainerCallback):
    """Evaluates every `eval_seconds` of training and stops after `train_seconds`."""

    def __init__(self, args: CurveArguments, seed: int, progress: "tqdm[Any]") -> None:
        self.args, self.seed, self.progress = args, seed, progress
        self.heldout = load_arithmetic("heldout", args.eval_items, seed)
        self.points: list[Point] = []
        self.seconds, self.completions = 0.0, 0
        self._step_began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._evaluate(args, **kwargs)

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._step_began
        self.progress.n = min(self.seconds, self.args.train_seconds)
        self.progress.refresh()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:  # a generation
            self.completions += args.generation_batch_size
        if self.seconds - self.points[-1].seconds >= self.args.eval_seconds:
            self._evaluate(args, **kwargs)
            is_there = self.args.stop_at_target and self.points[-1].sampled >= self.args.target
            control.should_training_stop = is_there or self.seconds >= self.args.train_seconds
        return control

    def _evaluate(self, args: GRPOExtConfig, model: Any, processing_class: Any, **kwargs: Any) -> None:
        evaluation = evaluate(
            model,
            processing_class,
            self.heldout,
            max_new_tokens=args.max_completion_length,
            samples_per_item=self.args.eval_samples,
            batch_size=self.args.eval_items,
            seed=self.seed,
            description=None,
        )
        greedy, sampled = (
            statistics.fmean(
                answer.correct["strict"]
                for answer in evaluation.answers
                if answer.correct and (answer.temperature == 0) is is_greedy
            )
            for is_greedy in (True, False)
        )
        self.points.append(Point(self.seconds, self.completions, sampled, greedy))


def train(args: CurveArguments, variant: str, seed: int) -> list[Point]:
    trainer_class, options = VARIANTS[variant]
    known = {item.name for item in fields(GRPOExtConfig)}
    settings = {name: value for name, value in yaml.safe_load(CONFIG.read_text()).items() if name in known}
    bundle = gsm8k_bundle()
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=args.train_seconds, desc=f"{variant}, seed {seed}", bar_format=BAR) as progress,
    ):
        settings |= options | {
            "output_dir": folder,
            "max_steps": 1_000_000,  # the clock decides
            "lr_scheduler_type": "constant",
            "learning_rate": args.learning_rate or settings["learning_rate"],
            "save_strategy": "no",
            "logging_steps": 1,
            "reward_weights": bundle.weights,
            "shared_prefix": args.shared_prefix,
            "seed": seed,
        }
        curve = Curve(args, seed, progress)
        trainer = trainer_class(
            model=embedded_policy_path(),
            reward_funcs=bundle,
            args=GRPOExtConfig(**settings),
            train_dataset=load_arithmetic("train", 4096, seed),
            callbacks=[curve],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return curve.points


def first_reached(points: list[Point], target: float, axis: str) -> float:
    """Where a straight line between evaluations first reaches the target; infinite if it does not."""
    for before, after in itertools.pairwise(points):
        if after.sampled >= target:
            share = max(0.0, (target - before.sampled) / (after.sampled - before.sampled))
            return getattr(before, axis) + share * (getattr(after, axis) - getattr(before, axis))
    return math.inf


def mean_and_range(values: list[float], digits: int = 0) -> str:
    if any(math.isinf(value) for value in values):
        return f"reached by {sum(math.isfinite(value) for value in values)} of {len(values)}"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_table(args: CurveArguments, curves: dict[str, dict[int, list[Point]]]) -> None:
    table = Table(
        "variant",
        f"seconds to {args.target:.0%}",
        f"completions to {args.target:.0%}",
        "sampled at the end",
        "completions a second",
        title=f"Embedded policy, sampled accuracy, mean (range) over seeds {args.seeds}",
    )
    for variant, runs in curves.items():
        table.add_row(
            variant,
            mean_and_range([first_reached(points, args.target, "seconds") for points in runs.values()]),
            mean_and_range([first_reached(points, args.target, "completions") for points in runs.values()]),
            mean_and_range([100 * points[-1].sampled for points in runs.values()]),
            mean_and_range([points[-1].completions / points[-1].seconds for points in runs.values()]),
        )
    Console(width=110 if not sys.stdout.isatty() else None).print(table)


def draw(args: CurveArguments, curves: dict[str, dict[int, list[Point]]], file: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (variant, runs) in enumerate(curves.items()):
        for run, points in enumerate(runs.values()):
            for axes, axis in ((left, "seconds"), (right, "completions")):
                axes.plot(
                    [getattr(point, axis) for point in points],
                    [point.sampled for point in points],
                    color=f"C{number}",
                    alpha=0.8,
                    label=variant if run == 0 else None,
                )
    for axes, label in ((left, "seconds of training"), (right, "generated completions")):
        axes.axhline(args.target, color="grey", linewidth=0.8, linestyle="--")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set_ylabel("sampled accuracy, held-out problems")
    right.legend()
    figure.savefig(file, dpi=130)


def main(argv: list[str]) -> None:
    (args,) = TrlParser([CurveArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    curves: dict[str, dict[int, list[Point]]] = {variant: {} for variant in args.variants}
    for seed in args.seeds:
        for variant in args.variants:
            curves[variant][seed] = train(args, variant, seed)
            content = {
                variant: {str(seed): [asdict(point) for point in points] for seed, points in runs.items()}
                for variant, runs in curves.items()
            }
            (args.output_dir / "learning_curve.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(args, curves, args.output_dir / "learning_curve.png")
    print_table(args, curves)
    print(f"Picture and figures are in {args.output_dir}")


if __name__ == "__main__":
    hf_logging.disable_progress_bar()  # of loading the policy
    logging.getLogger("trl_grpo_ext").setLevel(logging.ERROR)
    main(sys.argv[1:])
