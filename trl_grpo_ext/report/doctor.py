"""What is wrong with a run: rules over its record, each with a name, evidence, a threshold and a remedy.

[`diagnose`] asks all [`RULES`] about a run, finished or not. A rule is a small pure function that looks at the latest
generations or steps, and at the first ones where it compares, and says nothing until there are enough of them: shares
are of many completions, and a single odd value is none. A rule looks at no more than a window, so a long run is no
dearer than a short one. Imports no torch.

What would follow from another finding is left out: where all completions are cut off, it is no news that none is right.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .record import Run


PROBLEM, HINT = "problem", "hint"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Args:
        rule (`str`):
            The rule's name, such as `"truncated-completions"`.
        severity (`str`):
            `"problem"`, or `"hint"` where a run may be well all the same.
        title (`str`):
            What is wrong, a short sentence.
        evidence (`str`):
            A sentence with the numbers.
        threshold (`str`):
            When the rule fires.
        remedy (`str`):
            What to do.
        step (`int`):
            Since which step it holds, as far as the rule has looked back.
    """

    rule: str
    severity: str
    title: str
    evidence: str
    threshold: str
    remedy: str
    step: int

    @property
    def message(self) -> str:
        """All of it in one line."""
        return f"{self.title}. {self.evidence} {self.remedy} [{self.rule}]"


@dataclass(frozen=True)
class Found:
    """What a rule's function says when it fires; what is `None` is as the rule has it."""

    evidence: str
    step: int
    title: str | None = None
    remedy: str | None = None
    severity: str | None = None


@dataclass(frozen=True)
class Rule:
    """A rule: a function over a run, and what there is to say when it fires.

    Args:
        name (`str`):
            Under which it is reported.
        title (`str`), threshold (`str`), remedy (`str`), severity (`str`):
            As in [`Finding`].
        find (`Callable[[Run], Found | None]`):
            Whether it fires.
        explained_by (`tuple[str, ...]`, *optional*):
            Rules of which this one would only be a consequence: if one of them fires, it is left out.
    """

    name: str
    title: str
    threshold: str
    remedy: str
    severity: str
    find: Callable[[Run], Found | None]
    explained_by: tuple[str, ...] = ()

    def look(self, run: Run) -> Finding | None:
        found = self.find(run)
        if found is None:
            return None
        return Finding(
            rule=self.name,
            severity=found.severity or self.severity,
            title=found.title or self.title,
            evidence=found.evidence,
            threshold=self.threshold,
            remedy=found.remedy or self.remedy,
            step=found.step,
        )


# Everything truncated: TRL's default length is 256 tokens, and whoever trains a model that thinks has every completion
# cut off before its answer, rewards of 0 and nothing learned (TRL issue 5697).
TRUNCATED_SHARE = 0.5
TRUNCATED_COMPLETIONS = 32
TRUNCATED_GENERATIONS = 2
# At most so many steps are looked through for a metric.
LOOK_BACK = 200


def latest(run: Run, name: str, count: int) -> list[tuple[int, float]]:
    """The last values of a metric with their steps, oldest first; of logs, where steps have none."""
    found = [(step.step, step.metrics[name]) for step in run.steps[-LOOK_BACK:] if name in step.metrics]
    return (found or [(log.step, log.logs[name]) for log in run.logs[-LOOK_BACK:] if name in log.logs])[-count:]


def _truncated(run: Run) -> Found | None:
    size = run.generations[-1].statistics.completions if run.generations else 0
    if not size:
        return None
    count = max(TRUNCATED_GENERATIONS, -(-TRUNCATED_COMPLETIONS // size))
    values = latest(run, "completions/clipped_ratio", count)
    share = sum(value for _, value in values) / max(1, len(values))
    if len(values) < count or share < TRUNCATED_SHARE:
        return None
    masked = run.settings.get("mask_truncated_completions")
    consequence = (
        "with mask_truncated_completions=True they carry no gradient"
        if masked
        else "with mask_truncated_completions=False they are scored as they are, mostly wrong"
    )
    length = run.settings.get("max_completion_length", "unknown")
    return Found(
        f"{share:.0%} of the last {count * size} completions were cut off at max_completion_length={length}; "
        f"{consequence}.",
        values[0][0],
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "truncated-completions",
        "Most completions are cut off before they end",
        f"{TRUNCATED_SHARE:.0%} or more of the last {TRUNCATED_COMPLETIONS} completions and {TRUNCATED_GENERATIONS} "
        "generations end at max_completion_length",
        "Raise max_completion_length (TRL's default is 256 tokens, and a model that thinks needs 1,024 or more), or "
        "ask for shorter answers in the prompt.",
        PROBLEM,
        _truncated,
    ),
)


def diagnose(run: Run) -> list[Finding]:
    """What is wrong with a run, as far as it has come: problems first, in the order of the rules."""
    found = {rule.name: rule.look(run) for rule in RULES}
    explained = {rule.name for rule in RULES if any(found.get(name) for name in rule.explained_by)}
    findings = [finding for name, finding in found.items() if finding is not None and name not in explained]
    return sorted(findings, key=lambda finding: finding.severity != PROBLEM)


def doctor_table() -> list[tuple[str, str, str]]:
    """The rules as a table: name, when it fires, what to do."""
    return [(rule.name, rule.threshold, rule.remedy) for rule in RULES]
