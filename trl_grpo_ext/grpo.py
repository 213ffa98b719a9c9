"""GRPO on anybody's data: what `trl grpo` takes and does, with `GRPOExtTrainer`, its options, and what runs need.

    accelerate launch -m trl_grpo_ext.grpo --config run.yaml
    trl-grpo-ext grpo --config run.yaml --num_processes 8

Beyond TRL's script: rewards may be bundles; questions and references may be in any columns (`--question_column`,
`--answer_column`, `--answer_extractor`); data sets may be files; a run does not begin in another one's folder, and
goes on from its newest whole checkpoint (`--resume_from_checkpoint auto`); and with `--eval_strategy` or
`--eval_dataset_name` the policy is evaluated by [`EvaluationCallback`] too, where there are references. Exit status:
0 done, 1 a model, a data set or a package could not be had, 2 wrong arguments.
"""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .screen import begin_script


if __name__ == "__main__":
    begin_script()  # says so before the imports below, which take seconds

from accelerate import PartialState
from datasets import Dataset, load_dataset
from pyarrow import ArrowException
from trl import DatasetMixtureConfig, ModelConfig, get_dataset, get_peft_config, get_quantization_config
from trl.scripts.grpo import GRPOScriptArguments

from . import GRPOExtConfig, GRPOExtTrainer, script
from .arguments import OneLineParser
from .evaluation import check_problems
from .exits import one_line, stop
from .ranks import run_as_rank
from .rewards.bundle import RewardBundle
from .runs import CHANGED, settings_of
from .script_arguments import GRPOExtOptions
from .tasks import system_prompt_named, to_problems


@dataclass
class GRPOExtScriptArguments(GRPOExtOptions, GRPOScriptArguments):
    """The options of TRL's script for GRPO, and ours."""


OPTIONS = (GRPOExtScriptArguments, GRPOExtConfig, ModelConfig, DatasetMixtureConfig)
# How `datasets` reads a file, by its ending.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def launcher_options() -> list[str]:
    """What else a configuration file of `trl grpo` may hold: options of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    return ["accelerate_config", *vars(launch_command_parser().parse_args(["script"]))]


def parse_arguments(argv: list[str]) -> tuple[GRPOExtScriptArguments, Any, Any, Any, dict[str, Any]]:
    """The options, and the settings that tell this run from others: what was asked for."""
    parser = OneLineParser(OPTIONS, prog="trl_grpo_ext.grpo", description=__doc__.splitlines()[0])
    args, training_args, model_args, mixture_args = parser.parse_or_stop(argv, ignore=[CHANGED, *launcher_options()])
    script.check_settings(training_args, model_args)
    if not (args.dataset_name or mixture_args.datasets):
        stop(2, "--dataset_name is missing: name a file, a folder or a data set on the hub, or list 'datasets'")
    if not (args.reward_funcs or args.reward_model_name_or_path):
        stop(2, "--reward_funcs is missing: name a bundle such as gsm8k, rewards, or --reward_model_name_or_path")
    return args, training_args, model_args, mixture_args, settings_of(parser.given)


def load_splits(name: str, args: GRPOExtScriptArguments) -> Any:
    """All splits of a file, a folder or a data set on the hub."""
    path = Path(name).expanduser()
    ending = next((ending for ending in FORMATS if path.name.removesuffix(".gz").endswith(ending)), None)
    if ending is None or path.is_dir():
        return load_dataset(name, name=args.dataset_config, streaming=args.dataset_streaming)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return load_dataset(FORMATS[ending], data_files=str(path), streaming=args.dataset_streaming)


def choose_split(splits: Any, split: str, name: str, args: GRPOExtScriptArguments) -> Any:
    """A split, with the columns `prompt` and `answer` made of those that are named."""
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; its splits are {', '.join(map(str, splits))}")
    dataset = splits[split]
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} has no rows in split {split!r}")
    names_columns = any(args.columns.values())
    if not names_columns and args.system_prompt is None:
        if "prompt" not in first:
            raise ValueError(
                f"{name} has no column 'prompt' (its columns are {', '.join(first)}): name the one with the question, "
                "--question_column"
            )
        return dataset
    columns: dict[str, Any] = dict(args.columns)
    if columns["question_column"] is None and "question" not in first:
        columns["question_column"] = "prompt"
    return to_problems(
        dataset,
        **columns,
        system_prompt=system_prompt_named(args.system_prompt),
        keeps_columns=True,
        name=f"{name} ({split})",
    )


def load_eval_dataset(name: str, args: GRPOExtScriptArguments) -> Any:
    """The held-out problems of a data set of their own."""
    splits = load_splits(name, args)
    is_only_one = len(splits) == 1  # a file's, which is called "train"
    split = next(iter(splits)) if is_only_one else args.dataset_test_split
    return choose_split(splits, split, name, args)


def load_datasets(args: GRPOExtScriptArguments, mixture_args: Any, evaluates: bool) -> tuple[Any, Any]:
    """What is trained on, and the held-out problems if there is to be an evaluation."""
    name = "datasets" if mixture_args.datasets else args.dataset_name
    with script.data_errors("datasets" if mixture_args.datasets else "dataset_name", name):
        splits = get_dataset(mixture_args) if mixture_args.datasets else load_splits(name, args)
        train = choose_split(splits, args.dataset_train_split, name, args)
        if not evaluates:
            return train, None
        if args.eval_dataset_name is None:
            return train, choose_split(splits, args.dataset_test_split, f"{name}, without --eval_dataset_name,", args)
    with script.data_errors("eval_dataset_name", args.eval_dataset_name):
        return train, load_eval_dataset(args.eval_dataset_name, args)


def find_heldout(dataset: Any, num_items: int) -> Dataset | None:
    """The first problems of an evaluation set, if they have references that answers can be compared with."""
    rows = list(itertools.islice(dataset, num_items)) if dataset is not None else []
    if not rows or "answer" not in rows[0]:
        return None
    columns = ["prompt", "answer"]
    if all(isinstance(row.get("id"), str | int) for row in rows) and len({row["id"] for row in rows}) == len(rows):
        columns.append("id")
    try:
        problems = Dataset.from_list([{column: row[column] for column in columns} for row in rows])
        check_problems(problems)
    except (ValueError, ArrowException) as error:
        if PartialState().is_main_process:
            note = f"note: the policy's answers are not evaluated, rewards alone are: {one_line(error)}"
            print(note, file=sys.stderr)
        return None
    return problems


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    args, training_args, model_args, mixture_args, settings = parse_arguments(argv)
    script.set_cpu_threads(training_args, args.cpu_threads)
    start = script.find_start(args, training_args, settings)
    mixture = ", ".join(part.path for part in mixture_args.datasets)  # over `dataset_name`, as for `trl grpo`
    dataset = mixture or args.dataset_name
    script.announce(training_args, model_args.model_name_or_path, dataset)

    # Rewards and problems
    models = [args.reward_model_name_or_path] if args.reward_model_name_or_path else []
    rewards = script.find_bundle("reward_funcs", args.reward_funcs or [], training_args, RewardBundle(models))
    evaluates_between = training_args.eval_strategy != "no"
    evaluates = evaluates_between or args.eval_dataset_name is not None
    train_dataset, eval_dataset = load_datasets(args, mixture_args, evaluates)

    # Policy and trainer
    name = model_args.model_name_or_path
    training_args.model_init_kwargs = script.model_init_kwargs(training_args, model_args)
    script.check_model(model_args, training_args.trust_remote_code)
    trainer = script.make_trainer(
        GRPOExtTrainer,
        start,
        model=script.model_path(model_args),
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset if evaluates_between else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    script.check_chat_template(trainer.processing_class, name, next(iter(train_dataset))["prompt"])

    # Training
    heldout = find_heldout(eval_dataset, args.eval_items)
    evaluation = None if heldout is None else script.add_evaluation(trainer, heldout, args)
    script.train(trainer, start, args.max_minutes)

    # Results
    script.save(trainer)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset_name)
    if trainer.accelerator.is_main_process:
        before, after = (None, None) if evaluation is None else (evaluation.before, evaluation.after)
        seconds = time.perf_counter() - started
        summary = script.write_summary(trainer, before, after, seconds=seconds, model=name, dataset=dataset)
        script.print_summary(summary, before, after, {"heldout": "held-out problems"})
        script.write_report(trainer)
    trainer.accelerator.wait_for_everyone()  # a process that is gone early can leave another one waiting


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
