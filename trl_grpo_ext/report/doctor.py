"""What is wrong with a run: rules over its record, each with a name, evidence, a threshold and a remedy.

[`diagnose`] asks all [`RULES`] about a run, finished or not. A rule is a small pure function that looks at the latest
generations or steps, and at the first ones where it compares, and says nothing until there are enough of them: shares
are of many completions, and a single odd value is none. A rule looks at no more than a window, so a long run is no
dearer than a short one. Imports no torch.

What would follow from another finding is left out: where all completions are cut off, it is no news that none of them
is right.
"""

from dataclasses import replace

from .findings import HINT, PROBLEM, Finding, Found, Rule
from .record import Run
from .rules import RULES


__all__ = [
    "HINT",
    "PROBLEM",
    "RULES",
    "Finding",
    "Found",
    "Rule",
    "diagnose",
    "doctor_markdown",
    "doctor_table",
    "holding",
    "open_findings",
    "unexplained",
]


def diagnose(run: Run) -> list[Finding]:
    """What is wrong with a run, as far as it has come: problems first, in the order of the rules.

    Args:
        run ([`~trl_grpo_ext.report.record.Run`]):
            The run. Where its record says since when a finding holds, its step is that one.

    Returns:
        `list[Finding]`
    """
    since = open_findings(run)
    return [
        replace(finding, step=min(finding.step, since.get(finding.rule, finding.step)))
        for finding in unexplained(holding(run))
    ]


def holding(run: Run) -> dict[str, Finding]:
    """What the rules find, by their names, with what follows from something else."""
    found = ((rule.name, rule.look(run)) for rule in RULES)
    return {name: finding for name, finding in found if finding is not None}


def unexplained(found: dict[str, Finding]) -> list[Finding]:
    """Of what rules have found that which follows from nothing else, problems first."""
    explained = {rule.name for rule in RULES if any(name in found for name in rule.explained_by)}
    findings = [finding for name, finding in found.items() if name not in explained]
    return sorted(findings, key=lambda finding: finding.severity != PROBLEM)


def open_findings(run: Run) -> dict[str, int]:
    """The rules that hold as the run's record has it, with the step since which."""
    since: dict[str, int] = {}
    for event in run.findings:
        if event.holds:
            since.setdefault(event.rule, event.step)
        else:
            since.pop(event.rule, None)
    return since


def doctor_table() -> list[tuple[str, str, str]]:
    """The rules as a table: name, when it fires, what to do."""
    return [(rule.name, rule.threshold, rule.remedy) for rule in RULES]


def doctor_markdown() -> str:
    """[`doctor_table`] in Markdown, with titles."""
    rows = [f"| `{r.name}` ({r.severity}) | {r.title} | {r.threshold} | {r.remedy} |" for r in RULES]
    return "\n".join(["| rule | what it says | when it fires | what to do |", "|---|---|---|---|", *rows]) + "\n"
