"""`trl-grpo-ext compare`: two files of answers to the same problems."""

from dataclasses import dataclass, field

from ..arguments import OneLineParser
from ..evaluation.grade import CONVENTIONS
from ..exits import stop
from ..private import shorten_home
from ..screen import show
from ._files import BootstrapArguments, check_outputs, graded_answers, lines_of, write_json


EXAMPLE = """
trl-grpo-ext compare before.jsonl after.jsonl
trl-grpo-ext compare before.jsonl after.jsonl --convention lm_eval_flexible --output comparison.json
"""


@dataclass
class CompareArguments(BootstrapArguments):
    """How they are compared."""

    convention: str = field(
        default="answer",
        metadata={
            "help": "What the conclusion and the samples' figures go by; the table has the others beside it.",
            "choices": list(CONVENTIONS),
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "File for the differences: JSON, with intervals and p-values."}
    )
    ignore_prompts: bool = field(
        default=False,
        metadata={"help": "Pair problems by their ids alone: for two prompts that put the same questions."},
    )


def main(arguments: list[str]) -> None:
    parser = OneLineParser(
        [CompareArguments],
        prog="trl-grpo-ext compare",
        description="Compare two sets of answers to the same problems, paired by their ids: the difference with its "
        "95 % interval (paired bootstrap) and, where each problem has one completion, McNemar's exact test.",
        example=EXAMPLE,
    )
    parser.add_argument("a", help="Answers, as `trl-grpo-ext grade` takes them.")
    parser.add_argument("b", help="Answers to the same problems; differences are b minus a.")
    options, files = parser.parse_or_stop(arguments)
    check_outputs({"a": files.a, "b": files.b}, {"--output": options.output})

    from ..evaluation.comparison import compare_answers, comparison_table

    a, b = (graded_answers(path, lines_of(path)) for path in (files.a, files.b))
    try:
        comparison = compare_answers(a, b, ignore_prompts=options.ignore_prompts, seed=options.seed)
    except ValueError as error:
        stop(1, f"{files.a} and {files.b} cannot be compared: {error}")
    conclusion = comparison.conclusion(options.convention)
    if options.output is not None:
        names = shorten_home({"a": files.a, "b": files.b})
        write_json(options.output, {**names, **comparison.to_dict(), "conclusion": " ".join(conclusion)})
    print(f"a: {files.a}\nb: {files.b}")
    show(lambda: comparison_table(comparison, options.convention))
    print(f"{comparison.items} problems are in both.{_unpaired(comparison.unpaired_a, comparison.unpaired_b)}")
    if comparison.kind_a != comparison.kind_b:
        print(f"a's completions are {comparison.kind_a}, b's {comparison.kind_b}: this alone makes a difference.")
    print("\n".join(conclusion))


def _unpaired(only_a: int, only_b: int) -> str:
    if not only_a and not only_b:
        return ""
    return f" Left out, because they are in one alone: {only_a} of a, {only_b} of b."
