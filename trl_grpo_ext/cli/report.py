"""`trl-grpo-ext report`: a run, or several side by side, as one HTML page."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..arguments import OneLineParser
from ..exits import stop


EXAMPLE = """
trl-grpo-ext report outputs/run
trl-grpo-ext report outputs/run outputs/other --output comparison.html
"""


@dataclass
class ReportArguments:
    """Where the page goes."""

    output: str | None = field(
        default=None,
        metadata={
            "help": "File for the page. Default: report.html in the run's folder; of several runs, in the folder that "
            "all of them are in."
        },
    )


def main(arguments: list[str]) -> None:
    parser = OneLineParser(
        [ReportArguments],
        prog="trl-grpo-ext report",
        description="Show what a run did, what is wrong with it, and what it wrote: one HTML file that needs no "
        "network. Of several runs: their curves over one another, and what is different between them. A run may still "
        "be going on.",
        example=EXAMPLE,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Output folder of a run, which has its record.jsonl.")
    options, named = parser.parse_or_stop(arguments)

    from ..extras import PackageMissingError
    from ..report.page import MAX_RUNS, check_packages, write_report
    from ..report.record import RecordError, read_record

    if len(named.runs) > MAX_RUNS:
        stop(2, f"a report shows at most {MAX_RUNS} runs, got {len(named.runs)}: name fewer")
    for number, run in enumerate(named.runs):
        if any(Path(run).resolve() == Path(other).resolve() for other in named.runs[:number]):
            stop(2, f"{run!r} is named twice: name each run once")
    try:
        check_packages()
        runs = [read_record(run) for run in named.runs]
    except (PackageMissingError, RecordError) as error:
        stop(1, error)
    output = default_output([run.folder or Path() for run in runs]) if options.output is None else options.output
    _check_output(output, [run.folder or Path() for run in runs])
    try:
        file = write_report(runs, output)
    except OSError as error:
        stop(1, f"{output}: {error.strerror or error}; name another file, --output")
    print(f"The report is in {file}")


def default_output(folders: list[Path]) -> Path:
    """In the run's folder; of several runs in the one that all are in, or here if that is the root alone."""
    from ..report.page import REPORT_FILE

    if len(folders) == 1:
        return folders[0] / REPORT_FILE
    try:
        common = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    except ValueError:  # on different drives
        return Path(REPORT_FILE)
    if common == Path(common.anchor):
        return Path(REPORT_FILE)
    return Path(os.path.relpath(common)) / REPORT_FILE if common.is_relative_to(Path.cwd()) else common / REPORT_FILE


def _check_output(output: str | os.PathLike[str], folders: list[Path]) -> None:
    """End before anything is drawn if the page cannot be written, or would be written over a run's record."""
    from ..report.record import RECORD_FILE

    path = Path(output)
    if not os.fspath(output):
        stop(2, "--output: the file's name is missing")
    if path.is_dir():
        stop(2, f"--output: {str(path)!r} is a folder; name a file")
    if not path.parent.is_dir():
        stop(1, f"--output: there is no folder {str(path.parent)!r}")
    if any(path.resolve() == (folder / RECORD_FILE).resolve() for folder in folders):
        stop(2, f"--output: {str(path)!r} is a run's record, and would be overwritten: choose another file")
