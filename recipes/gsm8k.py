"""GRPO on grade-school mathematics, from a laptop without a network to a real model on GSM8K.

    accelerate launch recipes/gsm8k.py                                                  # embedded policy, CPU
    accelerate launch recipes/gsm8k.py --config recipes/configs/qwen2.5-0.5b.yaml       # a real model, GSM8K
    accelerate launch recipes/gsm8k.py --config ... --dataset_name path/to/train.jsonl  # GSM8K from a file

Options are those of `GRPOExtConfig` (TRL's `GRPOConfig` and this package's own), of TRL's `ModelConfig`, and of
`RecipeArguments` below. Without `--config` the defaults come from `recipes/configs/offline-tiny.yaml`. Measures the
accuracy on held-out problems before and after training and writes it to `<output_dir>/summary.json`; the settings are
in `<output_dir>/run.yaml`, which `--config` takes again. Exit status: 0 done, 1 a model, a data set or a package could
not be had, 2 wrong arguments.
"""

import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, ProgressCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.arguments import ArgumentError, OneLineParser, suggestion
from trl_grpo_ext.checkpoints import CheckpointError
from trl_grpo_ext.embedded_policy import EMBEDDED_POLICY, embedded_policy_path
from trl_grpo_ext.evaluation import Accuracy, evaluate
from trl_grpo_ext.ranks import BoundCollectiveCalls, run_as_rank, stop
from trl_grpo_ext.rewards import RewardBundle, gsm8k_bundle, tag_bundle
from trl_grpo_ext.runs import CHANGED, BeginRun, RunError, Start, choose_start, settings_of
from trl_grpo_ext.tasks import load_arithmetic, load_gsm8k


DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "offline-tiny.yaml"
BUNDLES = {"gsm8k": gsm8k_bundle, "tag": tag_bundle}
ARITHMETIC = "arithmetic"

# TRL and transformers still use the old name between themselves; there is nothing that a user could change.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)


@dataclass
class RecipeArguments:
    """What this recipe needs beyond TRL's own arguments."""

    dataset_name: str = field(
        default=ARITHMETIC,
        metadata={
            "help": "Training problems: 'arithmetic' (made from the seed), GSM8K's name on the hub, or the path of a "
            "JSON Lines or parquet file, or of a folder, in GSM8K's own format."
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Held-out problems, like dataset_name. Default: the test split where dataset_name has one; the "
            "last eval_items rows of a single file, which are then not trained on."
        },
    )
    train_items: int | None = field(
        default=None, metadata={"help": "Number of training problems. Default: all; 4096 for 'arithmetic'."}
    )
    eval_items: int = field(default=200, metadata={"help": "Number of held-out problems that are evaluated."})
    eval_samples: int = field(default=4, metadata={"help": "Samples for each problem (0: greedy decoding only)."})
    eval_batch_size: int = field(
        default=64, metadata={"help": "Completions an evaluation generates at once; vLLM sees to that itself."}
    )
    prompt_example: bool = field(
        default=False,
        metadata={
            "help": "Show a worked example before each GSM8K question, for models that never write the tags by "
            "themselves and so are never rewarded."
        },
    )
    bundle: str = field(default="gsm8k", metadata={"help": "The rewards to train on.", "choices": sorted(BUNDLES)})
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of each process on a CPU. Default: the cores, shared out."}
    )
    overwrite_run: bool = field(
        default=False, metadata={"help": "Start afresh even if output_dir holds a run with other settings."}
    )
    allow_changed_settings: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint with other settings than it was made with; run.yaml records them."},
    )
    settings: dict[str, Any] = field(default_factory=dict, init=False)  # all that was asked for, of all three classes

    def __post_init__(self) -> None:
        for name in ("train_items", "eval_items", "eval_batch_size", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.eval_samples < 0:
            raise ValueError(f"--eval_samples must not be negative, got {self.eval_samples}")


class CompactProgress(ProgressCallback):
    """The training bar with the reward in it, in place of a wall of metrics (they are in `trainer_state.json`)."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "reward" in logs:
            shown = {"reward": logs["reward"], "accuracy": logs.get("accuracy")}
            self.training_bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items() if value is not None})


def parse_arguments(argv: list[str]) -> tuple[RecipeArguments, GRPOExtConfig, ModelConfig]:
    if not any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    parser = OneLineParser([RecipeArguments, GRPOExtConfig, ModelConfig], description=__doc__.splitlines()[0])
    try:
        recipe_args, training_args, model_args = parser.parse_script(argv, ignore=[CHANGED])
    except ArgumentError as error:
        stop(2, error)
    if model_args.model_name_or_path is None:
        stop(2, "--model_name_or_path is missing: name a model on the hub, a folder, or 'embedded'")
    if training_args.temperature <= 0:
        stop(
            2, f"--temperature must be greater than 0, got {training_args.temperature}: all samples would be the same"
        )
    trackers = get_available_reporting_integrations()
    for name in training_args.report_to:
        if name not in trackers:
            found = ", ".join(trackers) or "none"
            stop(
                2,
                f"--report_to {name}: no such tracker is installed ({found})"
                f"{suggestion(name, INTEGRATION_TO_CALLBACK)}; install it, or set "
                "--report_to none",
            )
    if training_args.remove_unused_columns:
        stop(2, "--remove_unused_columns true would remove the answers, which the rewards need: leave it out")
    recipe_args.settings = settings_of(parser.given)
    return recipe_args, training_args, model_args


def set_cpu_threads(training_args: GRPOExtConfig, threads: int | None) -> None:
    """Use all cores of a CPU: `accelerate launch` leaves each process a single thread."""
    if training_args.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def load_problems(args: RecipeArguments, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """The training problems, and the held-out sets by the name under which the summary shows them."""
    if args.dataset_name == ARITHMETIC:
        train = load_arithmetic("train", args.train_items or 4096, seed)
        return train, {
            "heldout": load_arithmetic("heldout", args.eval_items, seed),
            "heldout_templates": load_arithmetic("heldout_templates", args.eval_items, seed),
        }
    load = partial(load_gsm8k, with_example=args.prompt_example)
    train = load(args.dataset_name, "train")
    if args.eval_dataset_name is not None:
        try:
            heldout = load(args.eval_dataset_name, "test")
        except (OSError, ValueError) as error:
            stop(1, f"--eval_dataset_name {args.eval_dataset_name!r} cannot be loaded. Cause: {error}")
    elif Path(args.dataset_name).is_file():
        if len(train) <= args.eval_items:
            raise ValueError(f"{args.dataset_name} has {len(train)} rows, too few to hold out {args.eval_items}")
        heldout = train.select(range(len(train) - args.eval_items, len(train)))
        train = train.select(range(len(train) - args.eval_items))
    else:
        heldout = load(args.dataset_name, "test")
    if args.train_items is not None:
        train = train.select(range(min(args.train_items, len(train))))
    return train, {"heldout": heldout.select(range(min(args.eval_items, len(heldout))))}


def load_tokenizer(model_args: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ends with one line if there is no such model."""
    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "trust_remote_code": trust_remote_code}
    try:
        AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        stop(
            1,
            f"model {name!r} cannot be loaded. Without a network, name the folder of a downloaded model with "
            f"--model_name_or_path, or use the embedded policy (--model_name_or_path embedded). Cause: {error}",
        )
    if tokenizer.chat_template is None:
        stop(1, f"model {name!r} has no chat template: choose an instruction-tuned model, the prompts are messages")
    return tokenizer


def look_for_runs(recipe_args: RecipeArguments, training_args: GRPOExtConfig) -> Start:
    """How this run begins; ends with one line if another one is in its place."""
    try:
        start = choose_start(
            training_args.output_dir,
            recipe_args.settings,
            training_args.resume_from_checkpoint,
            overwrite_run=recipe_args.overwrite_run,
            allow_changed_settings=recipe_args.allow_changed_settings,
        )
    except RunError as error:
        stop(2, error)
    if training_args.process_index == 0:
        for note in start.notes:
            print(f"note: {note}", file=sys.stderr)
    return start


def summarize(before: Accuracy, after: Accuracy) -> dict[str, dict[str, Any]]:
    return {"before": asdict(before), "after": asdict(after)}


def print_summary(summary: dict[str, Any]) -> None:
    titles = {"accuracy": "held-out problems", "accuracy_heldout_templates": "held-out problems, unseen templates"}
    if "accuracy_heldout_templates" in summary:
        titles["accuracy"] += " (new numbers, known templates)"
    table = Table("accuracy", "items", "before", "after", title=f"{summary['model']} on {summary['dataset']}")
    for section, title in titles.items():
        if section not in summary:
            continue
        before, after = summary[section]["before"], summary[section]["after"]
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for label, key in (
            ("greedy, strict (tagged answer)", "strict"),
            ("greedy, flexible (last number)", "flexible"),
            (f"sampled, strict (mean of {before['samples_per_item']})", "sampled"),
        ):
            if before[key] is not None:
                table.add_row(f"  {label}", str(before["items"]), f"{before[key]:.1%}", f"{after[key]:.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"{summary['optimizer_steps']} optimizer steps, {summary['seconds']:.0f} s; "
        f"summary and model are in {summary['output_dir']}",
        highlight=False,
    )


def main(argv: list[str]) -> None:
    start = time.perf_counter()
    recipe_args, training_args, model_args = parse_arguments(argv)
    set_cpu_threads(training_args, recipe_args.cpu_threads)
    run = look_for_runs(recipe_args, training_args)
    model_name = model_args.model_name_or_path
    if model_name == EMBEDDED_POLICY:
        model_args.model_name_or_path = embedded_policy_path()

    # Problems and rewards
    try:
        train_dataset, heldout = load_problems(recipe_args, training_args.seed)
    except (OSError, ValueError) as error:
        stop(
            1,
            f"data set {recipe_args.dataset_name!r} cannot be loaded. Without a network, give the path of GSM8K's "
            f"train.jsonl, or use --dataset_name arithmetic. Cause: {error}",
        )
    bundle = BUNDLES[recipe_args.bundle]()
    try:
        bundle = RewardBundle(bundle, training_args.reward_weights)
    except ValueError as error:
        stop(2, f"--reward_weights: {error}; the rewards are {', '.join(bundle.names)}")
    training_args.reward_weights = bundle.weights

    # Policy and trainer
    tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    try:
        trainer = GRPOExtTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=bundle,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=heldout["heldout"],  # for --eval_strategy
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except (ValueError, ImportError, OSError) as error:  # settings that do not go together, a package that is missing
        stop(1, error)
    trainer.run_record = run.record
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(CompactProgress)
    trainer.add_callback(BoundCollectiveCalls)
    trainer.add_callback(BeginRun(run))

    # Before, training, after. Under FSDP TRL can bring vLLM a model only once training has wrapped it.
    generates_with_vllm = training_args.use_vllm and not trainer.is_fsdp_enabled

    def evaluate_all(when: str) -> dict[str, Accuracy]:
        return {
            name: evaluate(
                trainer.model_wrapped,
                tokenizer,
                problems,
                max_new_tokens=training_args.max_completion_length,
                samples_per_item=recipe_args.eval_samples if name == "heldout" else 0,
                batch_size=recipe_args.eval_batch_size,
                seed=training_args.seed,
                accelerator=trainer.accelerator,
                vllm=trainer.vllm_generation if generates_with_vllm else None,
                description=f"Evaluating {when} ({name.replace('_', ' ')})",
            )
            for name, problems in heldout.items()
        }

    before = evaluate_all("before")
    try:
        if run.checkpoint is None and trainer.accelerator.is_main_process:
            Path(training_args.output_dir, "summary.json").unlink(missing_ok=True)  # an earlier attempt's
        trainer.train(resume_from_checkpoint=run.checkpoint)
    except (RunError, CheckpointError, ImportError, ValueError) as error:
        stop(1, error)
    after = evaluate_all("after")

    # Results
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        packages = ("trl_grpo_ext", "torch", "trl", "transformers", "accelerate", "datasets", "peft")
        summary = {
            "accuracy": summarize(before["heldout"], after["heldout"]),
            **{f"accuracy_{name}": summarize(before[name], after[name]) for name in heldout if name != "heldout"},
            "optimizer_steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - start, 1),
            "model": model_name,
            "dataset": recipe_args.dataset_name,
            "output_dir": training_args.output_dir,
            "seed": training_args.seed,
            "processes": trainer.accelerator.num_processes,
            "versions": {"python": sys.version.split()[0], **{package: version(package) for package in packages}},
        }
        (Path(training_args.output_dir) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print_summary(summary)
    trainer.accelerator.wait_for_everyone()  # a process that is gone early can leave another one waiting


if __name__ == "__main__":
    run_as_rank(main, sys.argv[1:])
