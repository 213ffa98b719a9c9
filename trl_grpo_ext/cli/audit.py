"""`trl-grpo-ext audit`: do a data set's own references get full marks from a bundle of rewards?

Exit status: 0 if every reference gets full marks, 1 if some do not, 2 if the data cannot be audited.
"""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..arguments import OneLineParser
from ..exits import stop
from ..extras import PackageMissingError
from ..screen import show
from ..script_arguments import ColumnArguments
from ._rewards import rewards_of


if TYPE_CHECKING:
    from rich.table import Table

    from ..rewards import AuditReport

EXAMPLE = """
trl-grpo-ext audit path/to/train.jsonl --bundle gsm8k
trl-grpo-ext audit problems.csv --question_column task --answer_column result --bundle my_rewards.make_bundle
"""


@dataclass
class AuditArguments(ColumnArguments):
    """What is audited."""

    bundle: str = field(
        default="tag",
        metadata={
            "help": "Rewards: gsm8k, hardened, math, tag, notebooks (gsm8k with their quirks), or a dotted name."
        },
    )
    split: str = field(default="train", metadata={"help": "Split on the hub or in a folder; a file is taken whole."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration on the hub, or subfolder."})
    failures: int = field(default=10, metadata={"help": "How many failures are listed."})

    def __post_init__(self) -> None:
        if self.failures < 0:
            raise ValueError(f"--failures must not be negative, got {self.failures}")


def main(arguments: list[str]) -> None:
    parser = OneLineParser(
        [AuditArguments],
        prog="trl-grpo-ext audit",
        description="Score each row's own reference as if a policy had written it, and list those that do not get "
        "full marks: there a reward takes the right answer for a wrong one.",
        example=EXAMPLE,
    )
    parser.add_argument("dataset", help="A JSON Lines, JSON, CSV or parquet file, a folder, or a name on the hub.")
    options, named = parser.parse_or_stop(arguments)
    bundle = rewards_of("bundle", options.bundle)

    from ..rewards.audit import audit, with_solutions
    from ..tasks import read_problems

    try:
        problems = read_problems(named.dataset, split=options.split, config=options.dataset_config, **options.columns)
        report = audit(bundle, with_solutions(bundle, problems))
    except (ValueError, OSError, PackageMissingError) as error:
        stop(2, error)
    print_report(report, options.failures)
    sys.exit(0 if report.ok else 1)


def print_report(report: "AuditReport", failures_shown: int) -> None:
    show(lambda: make_table(report))
    for failure in report.failures[:failures_shown]:
        score = "not scored" if failure.score is None else f"{failure.score:g}"
        print(
            f"row {failure.row}: {failure.reward} {score} of {failure.full_marks:g}, "
            f"answer {failure.columns.get('answer')!r}"
        )
    if len(report.failures) > failures_shown:
        print(f"... and {len(report.failures) - failures_shown:,} more")
    for column, rows in report.not_numbers.items():
        if rows:
            shown = ", ".join(map(str, rows[:failures_shown])) + (", ..." if len(rows) > failures_shown else "")
            print(
                f"warning: {len(rows):,} of the references in {column!r} are no plain numbers: answers to them are "
                f"right only character for character (rows {shown})"
            )
    print(f"{report.rows_with_full_marks:,} of {report.rows:,} references get full marks")


def make_table(report: "AuditReport") -> "Table":
    from rich.table import Table

    table = Table("reward", "full marks", title=f"{report.rows:,} references")
    for name, passed in report.passed.items():
        table.add_row(name, f"{passed:,} of {report.rows:,}")
    return table
