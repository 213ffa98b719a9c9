"""Whether the doctor names what is wrong, and is silent where nothing is.

    python scripts/check_doctor.py                                        # all sick runs, 3 healthy seeds: 10 minutes
    python scripts/check_doctor.py --healthy_seeds 0 1 2 3 4 --sick none

Trains the embedded policy with the settings of `recipes/configs/offline-tiny.yaml`: runs that are really made sick by
a setting, the references or the rewards, and healthy ones of several seeds, each as long as the demo. Prints which
rule fired in which run, and at which step. Exit status: 1 if a sick run is not named, or a problem is found in a
healthy one.
"""

import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging as hf_logging
from trl import TrlParser

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.report.doctor import PROBLEM, RULES
from trl_grpo_ext.report.record import FindingEvent, read_record
from trl_grpo_ext.rewards import (
    RewardBundle,
    get_correctness_reward,
    get_soft_format_reward,
    get_xmlcount_reward,
    gsm8k_bundle,
)
from trl_grpo_ext.tasks import load_arithmetic


# TRL and transformers still use the old name between themselves.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)

CONFIG = Path(__file__).resolve().parent.parent / "recipes" / "configs" / "offline-tiny.yaml"
NONE = "none"
SEVERITY = {rule.name: rule.severity for rule in RULES}


@dataclass(frozen=True)
class Sick:
    """A run with something wrong.

    Args:
        rule (`str`):
            The rule that must name it.
        by_step (`int`):
            By which step; the run ends there.
        settings (`dict[str, Any]`, *optional*):
            What it changes in the recipe's.
        rewards (`Callable[[], RewardBundle]`, *optional*):
            Its rewards.
        answer (`Callable[[int], str | None]`, *optional*):
            The reference of a row, by the row's number.
    """

    rule: str
    by_step: int
    settings: dict[str, Any] = field(default_factory=dict)
    rewards: Callable[[], RewardBundle] = gsm8k_bundle
    answer: Callable[[int], str | None] | None = None


def nothing(completions: list[Any], **kwargs: Any) -> list[None]:
    return [None for _ in completions]


def not_a_number(completions: list[Any], **kwargs: Any) -> list[float]:
    return [math.nan for _ in completions]


def infinity(completions: list[Any], **kwargs: Any) -> list[float]:
    return [math.inf if row == 0 else 1.0 for row in range(len(completions))]


def always_one(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0 for _ in completions]


def correct_if_contained(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    pairs = zip(completions, answer, strict=True)
    return [float(reference in completion[0]["content"]) for completion, reference in pairs]


def slow(completions: list[Any], **kwargs: Any) -> list[float]:
    time.sleep(6)
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


def length(completions: list[Any], **kwargs: Any) -> list[float]:
    return [len(completion[0]["content"]) / 100 for completion in completions]


def length_alone() -> RewardBundle:
    bundle = gsm8k_bundle()
    return bundle.with_weights(dict.fromkeys(bundle.names, 0.0)) + RewardBundle([length])


def other_tags() -> RewardBundle:
    tags = ("thinking", "result")
    return RewardBundle(
        [
            get_xmlcount_reward(tags=tags),
            get_soft_format_reward(tags=tags),
            get_correctness_reward(answer_tag="result"),
        ]
    )


def format_first() -> RewardBundle:
    bundle = gsm8k_bundle()
    return bundle.with_weights(dict.fromkeys(bundle.names[:-1], 20.0))


SICK = {
    "learning rate 3e-3": Sick("learning-rate-too-high", 12, {"learning_rate": 3e-3}),
    "learning rate 1e-3": Sick("kl-of-passes", 12, {"learning_rate": 1e-3}),
    "learning rate 0": Sick("learning-rate-zero", 4, {"learning_rate": 0.0}),
    "learning rate 1e-9": Sick("learning-rate-small", 11, {"learning_rate": 1e-9}),
    "learning rate 2e-6": Sick("nothing-changes", 60, {"learning_rate": 2e-6}),
    "8 tokens": Sick("truncated-completions", 5, {"max_completion_length": 8}),
    "8 tokens, masked": Sick(
        "truncated-completions", 5, {"max_completion_length": 8, "mask_truncated_completions": True}
    ),
    "no references": Sick("unscored-references", 4, {"check_references": False}, answer=lambda row: None),
    "wrong references": Sick("never-right", 10, answer=lambda row: str(-100_000 - row)),
    "other tags": Sick("no-format", 6, {"check_references": False}, rewards=other_tags),
    "reward None": Sick("reward-without-scores", 8, rewards=lambda: gsm8k_bundle() + [nothing]),
    "reward NaN": Sick("reward-without-scores", 8, rewards=lambda: gsm8k_bundle() + [not_a_number]),
    "reward infinite": Sick("reward-not-finite", 2, rewards=lambda: gsm8k_bundle() + [infinity]),
    "reward constant": Sick("constant-reward", 8, rewards=lambda: gsm8k_bundle() + [always_one]),
    "format 20 times": Sick("dominant-reward", 8, rewards=format_first),
    "empty references": Sick(
        "groups-all-right", 12, rewards=lambda: RewardBundle([correct_if_contained]), answer=lambda row: ""
    ),
    "reward for length": Sick("length-without-correctness", 40, rewards=length_alone),
    "slow reward": Sick("slow-rewards", 20, rewards=lambda: gsm8k_bundle() + [slow]),
    "8 passes, rate 1e-3": Sick("old-rollouts", 40, {"num_iterations": 8, "learning_rate": 1e-3}),
    "rate 3e-3 with beta": Sick("kl-to-reference", 12, {"beta": 0.001, "learning_rate": 3e-3}),
}
HEALTHY = Sick("", 120)


class StopAt(TrainerCallback):
    """Ends a run early, on the schedule of a whole one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        return control


def train(folder: Path, run: Sick, seed: int = 0) -> list[FindingEvent]:
    """Train a run, and give what the doctor said during it."""
    known = {item.name for item in fields(GRPOExtConfig)}
    settings = {name: value for name, value in yaml.safe_load(CONFIG.read_text()).items() if name in known}
    settings |= {"output_dir": str(folder), "save_strategy": "no", "seed": seed, **run.settings}
    dataset = load_arithmetic("train", 4096, seed)
    if run.answer is not None:
        answers = [run.answer(row) for row in range(len(dataset))]
        dataset = Dataset.from_dict({**dataset.to_dict(), "answer": answers})
    trainer = GRPOExtTrainer(
        model=embedded_policy_path(),
        reward_funcs=run.rewards(),
        args=GRPOExtConfig(**settings),
        train_dataset=dataset,
        callbacks=[StopAt(run.by_step)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    return read_record(folder).findings


@dataclass
class CheckArguments:
    """Which runs to make."""

    healthy_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of healthy runs."})
    sick: list[str] = field(
        default_factory=lambda: list(SICK), metadata={"help": f"Sick runs, by name; default all; '{NONE}' for none."}
    )
    steps: int = field(default=HEALTHY.by_step, metadata={"help": "Steps of a healthy run."})
    output_dir: Path | None = field(
        default=None, metadata={"help": "Where the runs' records and doctor.json go. Default: nowhere."}
    )

    def __post_init__(self) -> None:
        self.sick = [] if self.sick == [NONE] else self.sick
        unknown = [name for name in self.sick if name not in SICK]
        if unknown:
            raise ValueError(f"--sick: {unknown} are unknown, choose from {list(SICK)}")


def table_of(results: dict[str, list[FindingEvent]]) -> Table:
    table = Table(
        "run", "rule that must name it", "found at step", "all findings (step)", title="The doctor's findings"
    )
    for name, findings in results.items():
        expected = SICK[name].rule if name in SICK else "no problem"
        first = next((event.step for event in findings if event.holds and event.rule == expected), None)
        said = [f"{event.rule}{'' if event.holds else ' withdrawn'} ({event.step})" for event in findings]
        table.add_row(name, expected, "-" if first is None else str(first), ", ".join(said) or "nothing")
    return table


def is_right(name: str, findings: list[FindingEvent]) -> bool:
    """Whether a sick run is named, or a healthy one is called so; hints are no problems."""
    rules = {event.rule for event in findings if event.holds}
    return SICK[name].rule in rules if name in SICK else all(SEVERITY[rule] != PROBLEM for rule in rules)


def main(argv: list[str]) -> int:
    (args,) = TrlParser([CheckArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
    runs = {name: (SICK[name], 0) for name in args.sick}
    runs |= {f"healthy, seed {seed}": (Sick("", args.steps), seed) for seed in args.healthy_seeds}
    results: dict[str, list[FindingEvent]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (run, seed) in runs.items():
            results[name] = train(folder / name.replace(" ", "_").replace(",", ""), run, seed)
            print(f"{name}: {'right' if is_right(name, results[name]) else 'WRONG'}", flush=True)
            content = {key: [vars(event) for event in found] for key, found in results.items()}
            (folder / "doctor.json").write_text(json.dumps(content, indent=1) + "\n")
    Console(width=140 if not sys.stdout.isatty() else None).print(table_of(results))
    return 0 if all(is_right(name, found) for name, found in results.items()) else 1


if __name__ == "__main__":
    hf_logging.disable_progress_bar()  # of loading the policy
    logging.getLogger("trl_grpo_ext").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
