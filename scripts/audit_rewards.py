"""Score the reference solutions of a GSM8K file and list those that do not get full marks.

    python scripts/audit_rewards.py path/to/train.jsonl
    python scripts/audit_rewards.py path/to/train.jsonl --bundle gsm8k       # the recipes' own
    python scripts/audit_rewards.py path/to/train.jsonl --bundle notebooks   # the same with the notebooks' quirks

Exit status: 0 if every reference gets full marks, 1 if some do not, 2 if the file cannot be audited.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.table import Table

from trl_grpo_ext.rewards import AuditReport, RewardBundle, audit, gsm8k_bundle, tag_bundle
from trl_grpo_ext.tasks import load_gsm8k


BUNDLES: dict[str, Callable[[], RewardBundle]] = {
    "tag": tag_bundle,
    "gsm8k": gsm8k_bundle,
    "notebooks": partial(gsm8k_bundle, as_in_notebooks=True),
}


def print_report(report: AuditReport, failures_shown: int) -> None:
    console = Console()
    table = Table("reward", "full marks", title=f"{report.rows:,} references")
    for name, passed in report.passed.items():
        table.add_row(name, f"{passed:,} of {report.rows:,}")
    console.print(table)
    for failure in report.failures[:failures_shown]:
        score = "not scored" if failure.score is None else f"{failure.score:g}"
        console.print(
            f"row {failure.row}: {failure.reward} {score} of {failure.full_marks:g}, "
            f"answer {failure.columns.get('answer')!r}",
            markup=False,
            highlight=False,
        )
    if len(report.failures) > failures_shown:
        console.print(f"... and {len(report.failures) - failures_shown:,} more")
    for column, rows in report.not_numbers.items():
        if rows:
            shown = ", ".join(map(str, rows[:failures_shown])) + (", ..." if len(rows) > failures_shown else "")
            console.print(
                f"warning: {len(rows):,} of the references in {column!r} are no plain numbers: answers to them are "
                f"right only character for character (rows {shown})",
                markup=False,
                highlight=False,
            )
    console.print(f"{report.rows_with_full_marks:,} of {report.rows:,} references get full marks", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="a GSM8K file (JSON Lines or parquet), a folder of them, or a name on the hub")
    parser.add_argument("--split", default="train", help="split of a folder or of a hub dataset (default: train)")
    parser.add_argument("--bundle", choices=sorted(BUNDLES), default="tag", help="rewards to audit (default: tag)")
    parser.add_argument("--failures", type=int, default=10, help="how many failures to list (default: 10)")
    args = parser.parse_args()
    try:
        report = audit(BUNDLES[args.bundle](), load_gsm8k(args.dataset, args.split))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(report, args.failures)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
