"""`trl-grpo-ext grade`: figures from answers that are on disk, without the model."""

from dataclasses import dataclass, field
from typing import Any

from ..arguments import OneLineParser
from ..exits import stop
from ..screen import show
from ._files import BootstrapArguments, check_outputs, graded_answers, lines_of, write_json


EXAMPLE = """
trl-grpo-ext grade answers.jsonl
trl-grpo-ext grade answers.jsonl --output figures.json --lines verdicts.jsonl
"""


@dataclass
class GradeArguments(BootstrapArguments):
    """What is written beside the table."""

    output: str | None = field(
        default=None, metadata={"help": "File for the figures: JSON, each with mean, low and high, from 0 to 1."}
    )
    lines: str | None = field(
        default=None,
        metadata={
            "help": "File for the verdicts: the same lines in the same order, with true or false under strict, "
            "answer, lm_eval_strict and lm_eval_flexible. The reference moves to the key 'reference'."
        },
    )


def main(arguments: list[str]) -> None:
    parser = OneLineParser(
        [GradeArguments],
        prog="trl-grpo-ext grade",
        description="Grade answers under four conventions, and print accuracies with 95 % intervals. Figures are "
        "computed anew from each line's id, completion and answer (and sample and temperature, where they are there).",
        example=EXAMPLE,
    )
    parser.add_argument(
        "answers", help="JSON Lines with the keys id, completion and answer (the reference), one line a completion."
    )
    options, files = parser.parse_or_stop(arguments)
    check_outputs({"the file of answers": files.answers}, {"--output": options.output, "--lines": options.lines})

    from ..evaluation.answers import write_lines
    from ..evaluation.figures import figures_of, table_of

    lines = lines_of(files.answers)
    answers = graded_answers(files.answers, lines)
    try:
        figures = figures_of(answers, seed=options.seed)
    except ValueError as error:
        stop(1, f"{files.answers}: {error}")
    if options.output is not None:
        write_json(options.output, figures.to_dict())
    if options.lines is not None:
        verdicts = (
            _with_verdicts(line, answer.answer, answer.correct)
            for line, answer in zip(lines.values(), answers, strict=True)
        )
        try:
            write_lines(options.lines, verdicts)
        except OSError as error:
            stop(1, f"{options.lines}: {error.strerror}")
    show(lambda: table_of(figures))
    print(f"{figures.completions} completions of {figures.items} problems")


def _with_verdicts(line: dict[str, Any], reference: Any, correct: dict[str, bool] | None) -> dict[str, Any]:
    """A line with its verdicts. Its own `reference`, if it has another one, is kept as `input_reference`."""
    before = {"input_reference": line["reference"]} if line.get("reference", reference) != reference else {}
    return {**line, **before, "reference": reference, **(correct or {})}
