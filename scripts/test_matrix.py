"""Hold this package against several releases of TRL; `test_matrix.sh` starts it.

    bash scripts/test_matrix.sh                   # the oldest, a middle one and the pinned one, as README has them
    bash scripts/test_matrix.sh --all             # the last patch of every minor that is claimed
    bash scripts/test_matrix.sh --short           # what is not the pinned one, and fewer tests: part of test.sh
    bash scripts/test_matrix.sh 1.12.0 1.14.2
    bash scripts/test_matrix.sh --write           # and write the table into README.md

The tests are those of the contract with TRL, of parity and of the recipe. All packages but TRL are the pinned ones: a
release is installed without what it needs into a folder of its own, which is then found first.

Exit status: 0 all has passed, 1 something has not, 2 a release could not be installed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from trl_grpo_ext.screen import show


ROOT = Path(__file__).resolve().parent.parent
# The last patch of each minor. `compat.TESTED_TRL` names the minors; a test compares the two.
RELEASES = ("1.9.2", "1.10.0", "1.11.0", "1.12.0", "1.13.0", "1.14.2", "1.16.0")  # 1.15.0 trains on GPUs alone
OLDEST, MIDDLE, PINNED = RELEASES[0], "1.13.0", RELEASES[-1]
ALSO_NEEDED = "jmespath"  # for tools, by releases before the pinned one
SHORT = ("trl_contract", "iterations", "shared_prefix", "loss_comparison", "trl")
FULL = (
    *SHORT,
    *("sampling_correction", "rollouts", "trainer", "trainers_of_others", "generation_backends"),
    *("fuller_micro_batches", "evaluation_callback", "report_callback", "interrupt", "prefill", "recipe", "cli_grpo"),
)
BEGIN, END = "<!-- releases of TRL, by scripts/test_matrix.sh --write -->", "<!-- end -->"


def install(release: str, folder: Path) -> Path:
    """The folder with a release of TRL, which is made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: If pip cannot install it.
    """
    target = folder / release
    if not (target / ".installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(target), f"trl=={release}", ALSO_NEEDED], check=True)
        (target / ".installed").touch()
    return target


def run(release: str, folder: Path, tests: Sequence[str]) -> tuple[dict[str, int], int]:
    """Counts of a release's tests, and pytest's exit status."""
    path = [] if release == PINNED else [str(install(release, folder))]
    inherited = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, *filter(None, [inherited])])}
    print(f"\nTRL {release}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "tests.xml"
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in tests]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        if report.exists():
            for suite in ElementTree.parse(report).getroot().iter("testsuite"):  # noqa: S314  # pytest has written it
                counts = {name: count + int(suite.get(name, "0")) for name, count in counts.items()}
    return counts, status


def table_of(results: dict[str, tuple[dict[str, int], int]]) -> list[tuple[str, str, str]]:
    """A row for each release: what passed, and what was left out."""
    rows = []
    for release, (counts, status) in results.items():
        wrong = counts["failures"] + counts["errors"]
        passed = counts["tests"] - wrong - counts["skipped"]
        result = f"{passed} passed" if status == 0 else f"{wrong} FAILED, {passed} passed" if wrong else "FAILED"
        rows.append((release, result, str(counts["skipped"])))
    return rows


def write_table(rows: Sequence[tuple[str, str, str]], file: Path) -> None:
    """Put the rows between the marks in a file."""
    text = file.read_text(encoding="utf-8")
    lines = ["| TRL | tests | skipped |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    table = "\n".join([BEGIN, *lines, END])
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{file} has no place for the table, {BEGIN!r} to {END!r}")
    file.write_text(pattern.sub(lambda _: table, text), encoding="utf-8")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="test_matrix.sh", description="Hold this package against several releases of TRL.", allow_abbrev=False
    )
    parser.add_argument("releases", nargs="*", help=f"of TRL (default: {OLDEST}, {MIDDLE} and {PINNED})")
    parser.add_argument("--all", action="store_true", help="the last patch of every minor that is claimed")
    parser.add_argument("--short", action="store_true", help="fewer tests, and not the pinned release")
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    args = parser.parse_args(argv)
    for release in args.releases:
        if not re.fullmatch(r"\d+\.\d+\.\d+", release):
            parser.error(f"{release!r} is no release: name one such as {OLDEST}")
    if args.short and args.write:
        parser.error("--write needs all tests, and --short leaves some out: leave one of them out")
    if not args.releases:
        args.releases = list(RELEASES) if args.all else [OLDEST, MIDDLE, PINNED]
        if args.short:
            args.releases.remove(PINNED)
    return args


def main(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    folder = Path(os.environ.get("VENV_TRL", ROOT / ".venv-trl"))
    results = {}
    for release in args.releases:
        try:
            results[release] = run(release, folder, SHORT if args.short else FULL)
        except subprocess.CalledProcessError:
            print(f"error: TRL {release} could not be installed into {folder}", file=sys.stderr)
            return 2
    rows = table_of(results)
    table = Table("TRL", "tests", "skipped")
    for row in rows:
        table.add_row(*row)
    show(lambda: table)
    if args.write:
        write_table(rows, ROOT / "README.md")
    return 0 if all(status == 0 for _, status in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
