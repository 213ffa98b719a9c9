"""`trl-grpo-ext grpo`: starts `trl_grpo_ext.grpo` with `accelerate launch`, as `trl grpo` starts TRL's script.

Options of `accelerate launch` (`--num_processes 8`, `--accelerate_config zero2`, ...) may stand among the others, on
the command line and in the file.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from ..arguments import OneLineParser
from ..exits import stop
from ..script_arguments import GRPOExtOptions
from ..spelling import suggestion
from .launch import launch


MODULE = "trl_grpo_ext.grpo"
PROGRAM = "trl-grpo-ext grpo"
DESCRIPTION = (
    "Train with GRPO: all that `trl grpo` takes, and these. --reward_funcs also takes the bundles gsm8k, math, tag "
    "and dotted names of bundles or of functions that make one; --dataset_name a CSV, JSON Lines or parquet file too. "
    "--help_all lists the options of TRL, transformers and GRPOExtConfig too; those of `accelerate launch` may stand "
    "among them."
)
EXAMPLE = """
trl-grpo-ext grpo --config run.yaml --num_processes 8          # a file as `trl grpo` takes it
trl-grpo-ext grpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --reward_funcs gsm8k --output_dir outputs/run \\
  --dataset_name problems.csv --question_column task --answer_column result --eval_dataset_name heldout.csv
"""


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        OneLineParser([GRPOExtOptions], prog=PROGRAM, description=DESCRIPTION, example=EXAMPLE).print_help()
        return
    if "--help_all" in arguments:
        make_parser().print_help()
        return
    if is_launched():
        from ..grpo import main as train
        from ..ranks import run_as_rank

        run_as_rank(train, arguments)
        return
    launch(lambda: split_arguments(arguments))


def is_launched() -> bool:
    """Whether a launcher has started this process: `accelerate launch -m trl_grpo_ext grpo ...`."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


class NamesParser(OneLineParser):
    """Parses without making the dataclasses: what they check depends on the number of processes."""

    def parse_args_into_dataclasses(self, args: Any = None, **_: Any) -> tuple[Any, ...]:
        return (self.parse_known_args(args)[1],)


def make_parser() -> OneLineParser:
    """The parser of all options; importing them imports torch."""
    from ..grpo import OPTIONS

    return NamesParser(OPTIONS, prog=PROGRAM, description=DESCRIPTION, example=EXAMPLE)


def split_arguments(arguments: Sequence[str], parser: OneLineParser | None = None) -> Namespace:
    """The arguments of `accelerate launch`, which are those that are none of ours, with ours behind the module's name.

    Ours are those of the parser, by default [`make_parser`]. Ends the process if an option is neither's, or a value
    cannot be had.
    """
    from accelerate.commands.launch import launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from ..runs import CHANGED

    parser, launcher = parser or make_parser(), launch_command_parser()
    launcher.error = lambda message: stop(2, message)
    try:
        in_file, on_command_line = parser.parse_known_script(arguments)
        # a run's own file also says where it went on with other settings
        pairs = zip(in_file[::2], in_file[1::2], strict=True)
        in_file = [part for pair in pairs for part in pair if pair[0] != f"--{CHANGED}"]
        options = resolve_accelerate_config_argument([*in_file, *on_command_line])
    except ValueError as error:
        stop(2, error)
    known, unknown = launcher.parse_known_args([*options, "--module", MODULE])
    if unknown or known.training_script != MODULE:
        refuse(unknown[0] if unknown else known.training_script, in_file, [*parser.given, *vars(known)])
    return launcher.parse_args([*options, "--module", MODULE, *without(arguments, on_command_line)])


def refuse(option: str, in_file: Sequence[str], names: Sequence[str]) -> NoReturn:
    """End because of what is neither an option of the script nor one of the launcher."""
    name = option.partition("=")[0].lstrip("-").replace("-", "_")
    if not option.startswith("-"):
        stop(2, f"{option!r} belongs to no option")
    if option in in_file:
        stop(2, f"--config: there is no option {name!r}{suggestion(name, names)}")
    stop(2, f"there is no option {option.partition('=')[0]}{suggestion(name, names, '--')}")


def without(arguments: Sequence[str], removed: Sequence[str]) -> list[str]:
    """What is left of a command line when words are taken out that stand there in this order."""
    waiting, kept = list(removed), []
    for argument in arguments:
        if waiting and argument == waiting[0]:
            waiting.pop(0)
        else:
            kept.append(argument)
    return kept
