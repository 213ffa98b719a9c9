"""`trl-grpo-ext score`: a bundle of rewards over a file of completions."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..arguments import OneLineParser
from ..exits import stop
from ..screen import show
from ._files import check_outputs, lines_of
from ._rewards import rewards_of


if TYPE_CHECKING:
    from rich.table import Table

    from ..rewards import RewardBundle
    from ..rewards.score import Scores, Summary

EXAMPLE = """
trl-grpo-ext score outputs/run/answers/after.jsonl --bundle gsm8k
trl-grpo-ext score completions.jsonl --bundle my_rewards.make_bundle --completion_column text --output scores.jsonl
"""


@dataclass
class ScoreArguments:
    """How completions are scored."""

    bundle: str = field(
        metadata={"help": "Rewards: gsm8k, hardened, math, tag, notebooks, a reward of TRL's, or a dotted name."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "File for the same lines, each with its 'scores' by reward and the weighted 'reward'."},
    )
    completion_column: str = field(default="completion", metadata={"help": "Key of the completion."})
    prompt_column: str = field(default="prompt", metadata={"help": "Key of the prompt; lines may lack it."})
    answer_column: str = field(
        default="answer", metadata={"help": "Key of what the rewards are given as 'answer'; lines may lack it."}
    )


def main(arguments: list[str]) -> None:
    parser = OneLineParser(
        [ScoreArguments],
        prog="trl-grpo-ext score",
        description="Score completions with a bundle of rewards, as training does. All keys of a line are columns "
        "that the rewards can look at.",
        example=EXAMPLE,
    )
    parser.add_argument("completions", help="JSON Lines, one completion a line; an evaluation's answers.jsonl is one.")
    options, files = parser.parse_or_stop(arguments)
    check_outputs({"the file of completions": files.completions}, {"--output": options.output})
    bundle = rewards_of("bundle", options.bundle)

    from ..evaluation.answers import write_lines
    from ..rewards.score import score

    lines = lines_of(files.completions)
    try:
        rows = [_to_row(f"{files.completions}, line {number}", line, options) for number, line in lines.items()]
        if not rows:
            raise ValueError(f"{files.completions} has no completions in it")
        scores = score(bundle, rows)
        if options.output is not None:
            write_lines(options.output, _with_scores(lines.values(), scores))
    except ValueError as error:
        stop(1, error)
    except OSError as error:
        stop(1, f"{options.output}: {error.strerror}")
    show(lambda: make_table(scores, bundle, files.completions))


def _to_row(place: str, line: Any, options: ScoreArguments) -> dict[str, Any]:
    """A line with its columns called as rewards call them."""
    if not isinstance(line, dict):
        raise ValueError(f"{place}: not a JSON object but a {type(line).__name__}")
    if line.get(options.completion_column) is None:
        raise ValueError(
            f"{place}: no completion in {options.completion_column!r}; its keys are {', '.join(sorted(line))}"
        )
    named = {"completion": options.completion_column, "prompt": options.prompt_column, "answer": options.answer_column}
    others = {name: value for name, value in line.items() if name not in named.values()}
    return {**others, **{name: line[key] for name, key in named.items() if key in line}}


def _with_scores(lines: Any, scores: "Scores") -> Any:
    for index, line in enumerate(lines):
        of_line = {name: values[index] for name, values in scores.by_reward.items()}
        yield {**line, "scores": of_line, "reward": scores.total[index]}


def make_table(scores: "Scores", bundle: "RewardBundle", title: str) -> "Table":
    """Each reward's scores, and those of all together, in a few numbers."""
    from rich.table import Table

    from ..rewards.score import full_marks_of, summarize

    table = Table(title=f"{title}: {len(scores.total):,} completions", title_justify="left")
    table.add_column("reward", no_wrap=True)
    for column in ("mean", "spread", "min", "max", "full marks", "not scored"):
        table.add_column(column, justify="right")
    full_marks = full_marks_of(bundle)
    for name, weight in zip(bundle.names, bundle.weights, strict=True):
        shown = name if weight == 1 else f"{name} x {weight:g}"
        table.add_row(shown, *_cells(summarize(scores.by_reward[name], full_marks[name])))
    known = [full_marks[name] for name in bundle.names]
    best = None
    if None not in known and min(bundle.weights) >= 0:  # each at its best is all at their best
        best = sum(weight * mark for weight, mark in zip(bundle.weights, known, strict=True) if mark is not None)
    table.add_section()
    table.add_row("total", *_cells(summarize(scores.total, best)))
    return table


def _cells(summary: "Summary") -> list[str]:
    numbers = [summary.mean, summary.spread, summary.minimum, summary.maximum]
    shares = [summary.full_marks, summary.not_scored]
    return [
        *("" if number is None else f"{number:.3f}" for number in numbers),
        *("" if share is None else f"{share:.1%}" for share in shares),
    ]
