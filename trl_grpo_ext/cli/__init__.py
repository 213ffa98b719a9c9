"""The command `trl-grpo-ext`: each subcommand is a file here, imported when it is called.

A subcommand's file has a function `main`, which takes the arguments behind the subcommand's name. What is wrong with
them ends the process with one line and status 2; what cannot be had (a model, a file), with one line and status 1.
"""

import sys
from importlib import import_module


# What each does, for `trl-grpo-ext --help`, which imports none of them
SUBCOMMANDS = {
    "doctor": "before a run: what this machine, model and settings will get, and what is wrong with them",
    "grpo": "train: all that `trl grpo` takes, with GRPOExtTrainer",
    "launch": "`accelerate launch` for a script of yours, without its own warnings and tracebacks",
    "report": "a run, or several side by side, as a page: what happened, what is wrong, what it wrote",
    "evaluate": "let a model answer a data set's questions, and keep and grade the answers",
    "grade": "grade answers that are on disk, under four conventions",
    "compare": "two files of answers to the same questions, problem by problem",
    "audit": "which of a data set's own references get no full marks from a bundle of rewards",
    "score": "a bundle of rewards over a file of completions",
}
NEED_TRAIN = ("doctor", "grpo", "launch", "evaluate")  # the extra `train`; the others do without torch
USAGE = "usage: trl-grpo-ext SUBCOMMAND [options]"


def help_text() -> str:
    width = max(map(len, SUBCOMMANDS))
    listed = "\n".join(f"  {name:{width}}  {summary}" for name, summary in SUBCOMMANDS.items())
    return (
        f"{USAGE}\n\n{listed}\n\n"
        "trl-grpo-ext SUBCOMMAND --help lists a subcommand's options, with an example:\n\n"
        "  trl-grpo-ext evaluate --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run a subcommand; `arguments` are the process's own by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return
    name, *rest = arguments
    if name == "--version":
        from .. import __version__

        print(__version__)
        return
    if name not in SUBCOMMANDS:
        from ..exits import stop
        from ..spelling import suggestion

        hint = suggestion(name, SUBCOMMANDS) or f": the subcommands are {', '.join(SUBCOMMANDS)}"
        stop(2, f"there is no subcommand {name!r}{hint}")
    if name in NEED_TRAIN:
        from ..extras import require_or_stop

        require_or_stop(f"trl-grpo-ext {name}")
    try:
        import_module(f"{__name__}.{name}").main(rest)
    except KeyboardInterrupt:
        print("\nended by Ctrl-C", file=sys.stderr)
        sys.exit(130)
