"""A run's report, or several runs' side by side: one HTML file that needs nothing else.

[`write_report`] puts together what the other files of this folder find, and `page.html.jinja` lays it out. Whatever a
model or a data set has written goes through jinja2's escaping. Drawings are made with matplotlib; both come with
`pip install 'trl_grpo_ext[page]'`. Imports no torch.
"""

import base64
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation.answers import Answer, write_at_once
from ..evaluation.comparison import Difference, compare_answers
from ..evaluation.figures import Estimate
from ..evaluation.history import EvaluationRecord
from ..extras import PackageMissingError
from .completions import (
    Problem,
    answers_of,
    first_answers,
    heldout_problems,
    judged_by,
    stages_of,
    training_problems,
    visible,
)
from .doctor import RULES, Finding, diagnose
from .pictures import DASHES, MAX_POINTS, SERIES, WIDE, Chart, charts_of, dash_of, draw, span_of
from .record import RECORD_FILE, Run
from .summary import Summary, ends_of, evaluations_of, interval, is_of_best, summarize


TEMPLATE, SCRIPT = "page.html.jinja", "page.js"
REPORT_FILE = "report.html"
INSTALL = "pip install 'trl_grpo_ext[page]'"
MAX_RUNS = 12
# Sets of answers of which differences are looked for: the bootstrap of more takes longer than a page should.
MAX_ANSWERS_COMPARED = 30_000
SECTIONS = {
    "Is it learning?": ("accuracy", "format", "reward", "groups"),
    "What does it write?": ("length", "truncated", "entropy"),
    "How is it updated?": ("kl", "clipped", "passes", "reference", "sampler", "gradient", "rate"),
    "What does it cost?": ("seconds", "tokens", "gpu"),
}
BRIEF = ("strict", "answer", "format")
FIGURES = ("strict", "answer", "format", "truncated", "tokens")
NAMES_OF_FIGURES = {
    "strict": ("strict", "right, and in the answer tag"),
    "answer": ("answer", "right, wherever it stands"),
    "format": ("format", "an answer tag that is closed"),
    "truncated": ("truncated", "cut off at the longest length"),
    "tokens": ("tokens", "mean length"),
}


@dataclass(frozen=True)
class Part:
    """What the page says of one run by itself."""

    name: str
    run: Run
    summary: Summary
    findings: list[Finding]
    past: list[str]
    byline: list[str]
    colour: int
    dash: str


@dataclass(frozen=True)
class Row:
    """A row of a table: what it is about, in small print what that is, and the cells, each with its small print."""

    name: str
    note: str
    cells: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table of figures; `more` are rows that are there on demand."""

    title: str
    heads: list[str]
    rows: list[Row]
    note: str = ""
    more: list[Row] = field(default_factory=list)


def write_report(runs: Sequence[Run], file: str | os.PathLike[str]) -> Path:
    """Write the report of a run, or of several side by side.

    Args:
        runs (`Sequence[Run]`):
            The runs, of [`~trl_grpo_ext.report.record.read_record`]; the first is the one that others are compared
            with.
        file (`str` or `PathLike`):
            Where to.

    Returns:
        `Path`:
            The file.

    Raises:
        PackageMissingError: If matplotlib or jinja2 is not installed.
        ValueError: If there is no run, or there are more than `MAX_RUNS`.
        OSError: If the file cannot be written.
    """
    check_packages()
    if not 1 <= len(runs) <= MAX_RUNS:
        raise ValueError(f"a report shows 1 to {MAX_RUNS} runs, got {len(runs)}")
    page = render(runs)
    write_at_once(file, [page.encode("utf-8", "replace")])
    return Path(file)


def check_packages() -> None:
    """Whether what a report is drawn and laid out with is installed.

    Raises:
        PackageMissingError: If not.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PackageMissingError(f"a report needs matplotlib and jinja2 ({error}): {INSTALL}") from error


def render(runs: Sequence[Run]) -> str:
    """The page's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    script = (folder / SCRIPT).read_text(encoding="utf-8")
    names = names_of(runs)
    convention = judged_by(runs)
    answers = {id(run): _ends_answers(run) for run in runs}
    differences = [_differences(*answers[id(run)]) for run in runs]
    parts = [
        Part(
            name=name,
            run=run,
            summary=summarize(run, found),
            findings=diagnose(run),
            past=_past_findings(run),
            byline=_byline(run),
            colour=number % SERIES + 1,
            dash=DASHES[dash_of(number)] if len(runs) > 1 else "",
        )
        for number, (name, run, found) in enumerate(zip(names, runs, differences, strict=True))
    ]
    if len(runs) == 1:
        tables = _results_of_one(runs[0], differences[0])
        problems = _problems_of_one(runs[0], answers[id(runs[0])], convention)
        in_training = training_problems(runs[0])
    else:
        lasts = [answers[id(run)][1] for run in runs]
        tables = _results_of_several(runs, names, lasts)
        problems, in_training = heldout_problems(list(zip(names, lasts, strict=True)), convention, are_runs=True), []
    missing: dict[str, list[str]] = {}
    for part in parts:
        for text in part.summary.missing:
            missing.setdefault(text, []).append(part.name)
    return environment.get_template(TEMPLATE).render(
        parts=parts,
        missing=missing,
        healthy=[part.name for part in parts if not part.findings and not part.past],
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=_sections(runs, names),
        tables=tables,
        rules=len(RULES),
        convention=convention,
        problems=problems,
        in_training=in_training,
        shown=[shown for problem in [*problems, *in_training] for shown in problem.completions],
        smoothing=_smoothing(runs),
        differing=_differing_settings(runs),
        settings=_settings_of(runs[0]) if len(runs) == 1 else [],
        about=[(part.name, _about(part.run)) for part in parts],
        record_file=RECORD_FILE,
        version=__version__,
        script=Markup(script),  # noqa: S704  # the package's own file
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """What the runs are called: by their folders, and where these are the same by their parents too."""
    names = [visible(run.name) for run in runs]
    for number, run in enumerate(runs):
        if [other.name for other in runs].count(run.name) > 1 and run.folder is not None:
            names[number] = visible("/".join(run.folder.resolve().parts[-2:]))
    return [name if names.count(name) == 1 else f"{name} ({number + 1})" for number, name in enumerate(names)]


def _byline(run: Run) -> list[str]:
    dataset = run.about.get("dataset")
    found = [str(run.about["model"])] if run.about.get("model") else []
    if isinstance(dataset, dict):
        if dataset.get("name"):
            found.append(f"on {dataset['name']}")
        if isinstance(dataset.get("rows"), int):
            found.append(f"{dataset['rows']:,} training problems")
    if isinstance(run.about.get("processes"), int):
        count = run.about["processes"]
        found.append(f"{count} process{'es' if count > 1 else ''} on {run.about.get('device', 'unknown')}")
    if run.begins:
        found.append(time.strftime("begun %Y-%m-%d %H:%M UTC", time.gmtime(run.begins[0][1])))
    if len(run.begins) > 1:
        found.append(f"gone on {len(run.begins) - 1} times" if len(run.begins) > 2 else "gone on once")
    return [visible(text if len(text) <= 120 else f"{text[:120]} …") for text in found]


# Diagnosis


def _past_findings(run: Run) -> list[str]:
    """What was found during training and no longer held later on."""
    begun: dict[str, int] = {}
    past = []
    for event in run.findings:
        if event.holds:
            begun.setdefault(event.rule, event.step)
        elif event.rule in begun:
            past.append(f"{event.rule}: from step {begun.pop(event.rule)} to step {event.step}")
    return [visible(text) for text in past]


# Pictures


@dataclass(frozen=True)
class Figure:
    """A chart with its drawing, once more for a row of its own where it has one, and what its legend says."""

    chart: Chart
    svg: Any
    wide: Any
    legend: list[tuple[str, int, str]]


@dataclass(frozen=True)
class Section:
    """Charts that answer a question, and sentences for those of which there is nothing to see."""

    title: str
    figures: list[Figure]
    sentences: list[str]


def _sections(runs: Sequence[Run], names: Sequence[str]) -> list[Section]:
    charts = charts_of(runs, names)
    name_of = {id(chart): f"figure-{count}" for count, chart in enumerate(charts)}  # no text of a run is in a drawing
    sections = []
    for title, kinds in SECTIONS.items():
        found = [chart for chart in charts if chart.name.partition(":")[0] in kinds]
        drawn = [chart for chart in found if not chart.is_plain]
        # The first one takes a row where otherwise the last would stand in half of one
        figures = [_figure(chart, name_of[id(chart)], chart is drawn[0] and len(drawn) % 2 == 1) for chart in drawn]
        if found:
            sections.append(Section(title, figures, [chart.title for chart in found if chart.is_plain]))
    return sections


def _figure(chart: Chart, name: str, is_wide: bool) -> Figure:
    from markupsafe import Markup

    legend = [(curve.label, curve.colour + 1, DASHES[curve.dash % len(DASHES)]) for curve in chart.curves]
    svg = Markup(draw(replace(chart, name=name)))  # noqa: S704  # draw escapes the texts in it
    wide = Markup(draw(replace(chart, name=f"{name}-wide"), WIDE)) if is_wide else ""  # noqa: S704
    return Figure(chart, svg, wide, legend if len(legend) > 1 or chart.is_stacked else [])


def _smoothing(runs: Sequence[Run]) -> str:
    longest = max((run.last_step for run in runs), default=0)
    span = span_of(longest)
    if span < 3:
        return ""
    behind = "each step" if longest <= MAX_POINTS else "the range of the steps"
    return (
        f"Strong lines are running means over about {span:.0f} steps; behind them, faintly, {behind}. "
        "From and to in titles are means of the first and the last tenth; of held-out accuracy, the first and the "
        "last value."
    )


# Tables of figures


def _ends_answers(run: Run) -> tuple[list[Answer], list[Answer]]:
    ends = ends_of(run)
    if ends is None:
        return [], []
    last = answers_of(run, ends[1])
    return (last if ends[0].step == ends[1].step else answers_of(run, ends[0])), last


def _differences(a: Sequence[Answer], b: Sequence[Answer]) -> dict[str, Difference]:
    """Paired differences; none where answers cannot be paired, which is no error here."""
    if not a or not b or a is b or len(a) + len(b) > MAX_ANSWERS_COMPARED:
        return {}
    try:
        return compare_answers(a, b).differences
    except ValueError:
        return {}


def _figures_shown(records: Sequence[EvaluationRecord]) -> list[str]:
    found = dict.fromkeys(name for record in records for name in record.figures.estimates)
    samples = [name for name in found if name.startswith(("mean@", "pass@", "maj@")) and not name.endswith("@1")]
    return [name for name in FIGURES if name in found] + samples


def _cell(name: str, estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    scale = 1 if name == "tokens" else 100
    return f"{scale * estimate.mean:.1f}", interval(estimate, scale)


def _difference_cell(difference: Difference | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    return f"{100 * difference.difference:+.1f}".replace("-", "−"), (
        f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}".replace("-", "−")
    )


def _row(name: str, cells: list[tuple[str, str]]) -> Row:
    label, note = NAMES_OF_FIGURES.get(name, (name, ""))
    return Row(label, note, cells)


def _results_of_one(run: Run, differences: dict[str, Difference]) -> list[Table]:
    tables = []
    for number, name in enumerate(dict.fromkeys(record.set for record in run.evaluations)):
        records = evaluations_of(run, name)
        first, last = records[0], records[-1]
        ends = [first] if first is last else [first, last]
        paired = differences if number == 0 else {}
        rows = []
        for figure in _figures_shown(records):
            cells = [_cell(figure, record.figures.estimates.get(figure)) for record in ends]
            if paired:
                cells.append(_difference_cell(paired.get(figure)))
            rows.append(_row(figure, cells))
        heads = [_when(run, record) for record in ends] + (["difference, paired"] if paired else [])
        items = last.figures.items
        tables.append(_table(f"{visible(name)}: {items:,} problems, in %, with 95 % intervals", heads, rows))
    return tables


def _table(title: str, heads: list[str], rows: list[Row], note: str = "") -> Table:
    """A table whose first rows are shown, with the others on demand."""
    brief = [row for row in rows if row.name in BRIEF or row.name.startswith("mean@")]
    return Table(title, heads, brief, note, [row for row in rows if row not in brief])


def _when(run: Run, record: EvaluationRecord) -> str:
    if is_of_best(run, record):
        return "after, best checkpoint"
    return {"before": "before", "after": f"after {record.step} steps"}.get(record.evaluation, f"step {record.step}")


def _results_of_several(runs: Sequence[Run], names: Sequence[str], answers: Sequence[Sequence[Answer]]) -> list[Table]:
    tables = []
    sets = dict.fromkeys(record.set for run in runs for record in run.evaluations)
    for number, name in enumerate(sets):
        lasts = [next(iter(evaluations_of(run, name)[::-1]), None) for run in runs]
        found = [record for record in lasts if record is not None]
        rows = [
            _row(figure, [_cell(figure, r.figures.estimates.get(figure)) if r else ("", "") for r in lasts])
            for figure in _figures_shown(found)
        ]
        heads = [
            f"{run_name}, {_when(run, record)}" if record else run_name
            for run, run_name, record in zip(runs, names, lasts, strict=True)
        ]
        items = " or ".join(sorted({f"{record.figures.items:,}" for record in found}))
        title = f"{visible(name)}: {items} problems, in %, with 95 % intervals"
        paired, unpaired = _paired(names, answers) if number == 0 else ([], "")
        tables += [_table(title, heads, rows, note=unpaired), *paired]
    tables.append(_costs_of_several(runs, names))
    return tables


def _paired(names: Sequence[str], answers: Sequence[Sequence[Answer]]) -> tuple[list[Table], str]:
    """Each run against the first, on the same problems; and in a sentence which of them cannot be."""
    found = {
        name: differences
        for name, of_run in zip(names[1:], answers[1:], strict=True)
        if (differences := _differences(answers[0], of_run))
    }
    others = [name for name, of_run in zip(names[1:], answers[1:], strict=True) if of_run and name not in found]
    unpaired = (
        f"Not compared with {names[0]} problem by problem, because the problems are others or their answers are not "
        f"there: {', '.join(others)}. Figures of different problems say little about which run is better."
        if others
        else ""
    )
    if not found:
        return [], unpaired
    figures = dict.fromkeys(name for differences in found.values() for name in differences)
    chosen = [
        name
        for name in figures
        if name in FIGURES or (name.startswith(("mean@", "pass@", "maj@")) and not name.endswith("@1"))
    ]
    rows = [_row(name, [_difference_cell(of_run.get(name)) for of_run in found.values()]) for name in chosen]
    ids = set(first_answers(answers[0]))
    shared = {
        len(ids & set(first_answers(of_run)))
        for name, of_run in zip(names[1:], answers[1:], strict=True)
        if name in found
    }
    count = " or ".join(f"{number:,}" for number in sorted(shared))
    return [
        _table(
            f"Difference to {names[0]}, problem by problem, in points with 95 % intervals",
            list(found),
            rows,
            note=f"{count} problems are in both. Where an interval leaves out 0, the difference can be told.",
        )
    ], unpaired


def _costs_of_several(runs: Sequence[Run], names: Sequence[str]) -> Table:
    facts = [{fact.label: fact for fact in summarize(run).facts} for run in runs]
    labels = [label for label in ("optimizer steps", "completions", "time") if any(label in of for of in facts)]
    rows = [
        Row(label, "", [(of[label].value, of[label].note) if label in of else ("", "") for of in facts])
        for label in labels
    ]
    return Table("What the runs took", list(names), rows)


# Completions


def _problems_of_one(run: Run, ends: tuple[list[Answer], list[Answer]], convention: str) -> list[Problem]:
    stages = stages_of(run)
    columns = []
    for record in stages:
        answers = ends[0] if record is stages[0] else ends[1] if record is stages[-1] else answers_of(run, record)
        columns.append((_when(run, record), answers))
    return heldout_problems(columns, convention)


# Settings


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return visible(text if len(text) <= 400 else f"{text[:400]} …")


def _settings_of(run: Run) -> list[tuple[str, str]]:
    return [(visible(str(name)), _text(value)) for name, value in sorted(run.settings.items())]


def _differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What is not the same in all runs: settings, and the model, data, rewards and versions."""
    if len(runs) == 1:
        return []
    flat = [_facts_about(run) for run in runs]
    tables = [
        of_run | {str(name): value for name, value in run.settings.items()}
        for of_run, run in zip(flat, runs, strict=True)
    ]
    names = dict.fromkeys(name for table in tables for name in sorted(table))
    ignored = {"output_dir", "run_name", "logging_dir"}
    rows = []
    for name in names:
        values = [_text(table[name]) if name in table else "—" for table in tables]
        if len(set(values)) > 1 and name not in ignored:
            rows.append((visible(name), values))
    return rows


def _flat(about: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in about.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _facts_about(run: Run) -> dict[str, Any]:
    """What is known of a run beside its settings; a row for each reward."""
    rewards = {
        f"reward {reward.name}": f"weight {reward.weight:g}, {reward.kind}"
        + ("" if reward.full_marks is None else f", full marks {reward.full_marks:g}")
        for reward in run.rewards
    }
    rest = _flat({key: value for key, value in run.about.items() if key not in ("settings", "rewards")})
    return rest | rewards


def _about(run: Run) -> list[tuple[str, str]]:
    return [
        (visible(name), f"{value:,}" if isinstance(value, int) else _text(value))
        for name, value in _facts_about(run).items()
    ]
