"""A rule of the doctor, and what it finds. Imports no torch."""

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
        """All of it in one line, whatever the reward functions are called."""
        text = f"{self.title}. {self.evidence} {self.remedy} [{self.rule}]"
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


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


def rule(
    name: str, title: str, *, when: str, remedy: str, severity: str = PROBLEM, explained_by: tuple[str, ...] = ()
) -> Callable[[Callable[[Run], Found | None]], Rule]:
    """Make a [`Rule`] of the function below; `when` is its threshold."""
    return lambda find: Rule(name, title, when, remedy, severity, find, explained_by)
