"""GRPO on grade-school mathematics, from a laptop without a network to a real model on GSM8K.

    accelerate launch recipes/gsm8k.py                                                  # embedded policy, CPU
    accelerate launch recipes/gsm8k.py --config recipes/configs/qwen2.5-0.5b.yaml       # a real model, GSM8K
    accelerate launch recipes/gsm8k.py --config ... --dataset_name path/to/train.jsonl  # GSM8K from a file

Options are those of `GRPOExtConfig` (TRL's `GRPOConfig` and this package's own), of TRL's `ModelConfig`, and of
`RecipeArguments` below. Without `--config` the defaults come from `recipes/configs/offline-tiny.yaml`. Evaluates the
policy on held-out problems before and after training, and in between where `--eval_strategy` says so; figures go to
`<output_dir>/summary.json` and to the trackers, and all answers to `<output_dir>/answers`. The settings are in
`<output_dir>/run.yaml`, which `--config` takes again. Exit status: 0 done, 1 a model, a data set or a package could
not be had, 2 wrong arguments.
"""

import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trl_grpo_ext.screen import begin_script


if __name__ == "__main__":
    begin_script()  # says so before the imports below, which take seconds

from datasets import Dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer, script
from trl_grpo_ext.arguments import OneLineParser
from trl_grpo_ext.ranks import run_as_rank, stop
from trl_grpo_ext.runs import CHANGED, settings_of
from trl_grpo_ext.script_arguments import RunArguments
from trl_grpo_ext.tasks import hold_out, load_arithmetic, load_problems


DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "offline-tiny.yaml"
ARITHMETIC = "arithmetic"
TITLES = {"heldout": "held-out problems"}
ARITHMETIC_TITLES = {
    "heldout": "held-out problems (new numbers, known templates)",
    "heldout_templates": "held-out problems, unseen templates",
}


@dataclass
class RecipeArguments(RunArguments):
    """What this recipe needs beyond TRL's own arguments."""

    dataset_name: str = field(
        default=ARITHMETIC,
        metadata={
            "help": "Training problems: 'arithmetic' (made from the seed); 'gsm8k', 'math', 'svamp' or 'asdiv', or "
            "their names on the hub; or the path of a file or a folder in one of their formats. Without "
            "eval_dataset_name, the last eval_items rows of a single file are held out and not trained on."
        },
    )
    train_items: int | None = field(
        default=None, metadata={"help": "Number of training problems. Default: all; 4096 for 'arithmetic'."}
    )
    prompt_example: bool = field(
        default=False,
        metadata={
            "help": "Show a worked example before each question, for models that never write the tags by themselves "
            "and so are never rewarded."
        },
    )
    bundle: str = field(
        default="gsm8k",
        metadata={
            "help": "The rewards to train on: 'gsm8k', 'tag', 'math' (where answers are formulas), or a dotted name "
            "of your own."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_items is not None and self.train_items < 1:
            raise ValueError(f"--train_items must be at least 1, got {self.train_items}")


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, GRPOExtConfig, ModelConfig, dict[str, Any]]:
    """The options, and the settings that tell this run from others: what was asked for."""
    if not any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    parser = OneLineParser([RecipeArguments, GRPOExtConfig, ModelConfig], description=__doc__.splitlines()[0])
    args, training_args, model_args = parser.parse_or_stop(argv, ignore=[CHANGED])
    script.check_settings(training_args, model_args)
    if training_args.remove_unused_columns:
        stop(2, "--remove_unused_columns true would remove the answers, which the rewards need: leave it out")
    return args, training_args, model_args, settings_of(parser.given)


def load_datasets(args: RecipeArguments, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """The training problems, and the held-out sets by the name under which their figures are shown."""
    if args.dataset_name == ARITHMETIC:
        train = load_arithmetic("train", args.train_items or 4096, seed)
        return train, {
            "heldout": load_arithmetic("heldout", args.eval_items, seed),
            "heldout_templates": load_arithmetic("heldout_templates", args.eval_items, seed),
        }
    load = partial(load_problems, with_example=args.prompt_example)
    train = load(args.dataset_name, split="train")
    if args.eval_dataset_name is not None:
        with script.data_errors("eval_dataset_name", args.eval_dataset_name):
            heldout = load(args.eval_dataset_name, split="test", max_rows=args.eval_items)
    elif Path(args.dataset_name).is_file():
        train, heldout = hold_out(train, args.eval_items, args.dataset_name)
    else:
        heldout = load(args.dataset_name, split="test", max_rows=args.eval_items)
    if args.train_items is not None:
        train = train.select(range(min(args.train_items, len(train))))
    return train, {"heldout": heldout}


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    args, training_args, model_args, settings = parse_arguments(argv)
    script.set_cpu_threads(training_args, args.cpu_threads)
    start = script.find_start(args, training_args, settings)
    script.announce(training_args, model_args.model_name_or_path, args.dataset_name)

    # Rewards and problems
    bundle = script.find_bundle("bundle", args.bundle, training_args)
    remedy = "Without a network, give the path of GSM8K's train.jsonl, or use --dataset_name arithmetic. "
    with script.data_errors("dataset_name", args.dataset_name, remedy):
        train_dataset, heldout = load_datasets(args, training_args.seed)

    # Policy and trainer
    tokenizer = script.load_tokenizer(model_args, training_args.trust_remote_code)
    training_args.model_init_kwargs = script.model_init_kwargs(training_args, model_args)
    trainer = script.make_trainer(
        GRPOExtTrainer,
        start,
        model=script.model_path(model_args),
        reward_funcs=bundle,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=heldout["heldout"],  # for --eval_strategy
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # Training; before it, after it and at each of its evaluations the policy answers the held-out problems
    evaluation = script.add_evaluation(trainer, heldout, args)
    script.train(trainer, start, args.max_minutes)

    # Results
    script.save(trainer)
    if trainer.accelerator.is_main_process:
        summary = script.write_summary(
            trainer,
            evaluation.before,
            evaluation.after,
            seconds=time.perf_counter() - started,
            model=model_args.model_name_or_path,
            dataset=args.dataset_name,
        )
        titles = ARITHMETIC_TITLES if args.dataset_name == ARITHMETIC else TITLES
        script.print_summary(summary, evaluation.before, evaluation.after, titles)
        script.write_report(trainer)
    trainer.accelerator.wait_for_everyone()  # a process that is gone early can leave another one waiting


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
