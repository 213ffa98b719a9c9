"""The doctor during training: what is new of its findings, and what no longer holds. Imports no torch."""

from collections.abc import Iterable
from typing import Any

from .doctor import PROBLEM, Finding, holding, open_findings, unexplained
from .record import Run


# It looks after each of so many first steps, when most goes wrong, and then after every so many.
FIRST_STEPS, EVERY_STEPS = 20, 10
# In so many looks, one after the other, a rule must not fire for its finding to be withdrawn: near a threshold it
# would come and go.
LOOKS_TO_WITHDRAW = 2


class Watch:
    """Looks at a run while it goes on, and says what has changed.

    A run that goes on from a checkpoint has its findings in its record, and those are not told again.
    """

    def __init__(self) -> None:
        self._has_begun = False
        self._open: dict[str, str] = {}  # titles by rule
        self._absent: dict[str, int] = {}
        self._told: set[tuple[str, bool]] = set()

    def look(self, run: Run, *, is_last: bool = False) -> list[dict[str, Any]]:
        """Look at a run after an optimizer step.

        Args:
            run ([`Run`]):
                The run as far as it has come.
            is_last (`bool`, *optional*, defaults to `False`):
                Look whichever step it is.

        Returns:
            `list[dict[str, Any]]`:
                An event of the record for each finding that is new or no longer holds. Besides what a record needs
                they have `severity`, and `is_first`: whether this has not been said of this rule before.
        """
        if not self._has_begun:
            self._begin(run)
        if not is_last and run.last_step > FIRST_STEPS and run.last_step % EVERY_STEPS:
            return []
        found = holding(run)
        return [*self._withdrawn(run, found), *self._new(run, unexplained(found))]

    def _begin(self, run: Run) -> None:
        self._has_begun = True
        self._open = dict.fromkeys(open_findings(run), "What was found before")
        self._told = {(event.rule, event.holds) for event in run.findings}

    def _new(self, run: Run, findings: Iterable[Finding]) -> list[dict[str, Any]]:
        events = []
        for finding in findings:
            self._absent.pop(finding.rule, None)
            if finding.rule not in self._open:
                events.append(self._event(run, finding.rule, finding.severity, True, finding.message))
            self._open[finding.rule] = finding.title
        return events

    def _withdrawn(self, run: Run, found: dict[str, Finding]) -> list[dict[str, Any]]:
        events = []
        for rule in [rule for rule in self._open if rule not in found]:
            self._absent[rule] = self._absent.get(rule, 0) + 1
            if self._absent[rule] >= LOOKS_TO_WITHDRAW:
                del self._absent[rule]
                message = f"{self._open.pop(rule)}: this no longer holds. [{rule}]"
                events.append(self._event(run, rule, PROBLEM, False, message))
        return events

    def _event(self, run: Run, rule: str, severity: str, holds: bool, message: str) -> dict[str, Any]:
        is_first = (rule, holds) not in self._told
        self._told.add((rule, holds))
        return {
            "event": "finding",
            "step": run.last_step,
            "rule": rule,
            "holds": holds,
            "message": message,
            "severity": severity,
            "is_first": is_first,
        }
