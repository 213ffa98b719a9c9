"""Do a data set's own references get full marks? Where they do not, a reward is grading the right answer as wrong."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .bundle import RewardBundle, reward_name


@dataclass(frozen=True)
class AuditRow:
    """A row whose reference did not get full marks from one reward."""

    row: int
    reward: str
    score: float | None
    full_marks: float
    solution: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class AuditReport:
    """What [`audit`] found.

    Args:
        rows (`int`):
            Number of rows that were scored.
        passed (`dict[str, int]`):
            For each reward, how many rows' references got full marks.
        failures (`list[AuditRow]`):
            One entry for each row and reward without full marks, in the rows' order.
    """

    rows: int
    passed: dict[str, int]
    failures: list[AuditRow]

    @property
    def rows_with_full_marks(self) -> int:
        """Number of rows that got full marks from every reward."""
        return self.rows - len({failure.row for failure in self.failures})

    @property
    def ok(self) -> bool:
        """Whether every reference got full marks from every reward."""
        return not self.failures


def audit(
    bundle: Iterable[Any],
    dataset: Iterable[Mapping[str, Any]],
    *,
    solution_column: str = "solution",
    full_marks: Mapping[str, float] | None = None,
) -> AuditReport:
    """Score each row's own reference solution as if a policy had written it.

    Args:
        bundle (`RewardBundle` or `list`):
            Reward functions. Weights do not matter here; reward models cannot be audited.
        dataset (`datasets.Dataset` or an iterable of dicts):
            Rows with the reference completion and whatever columns the rewards need.
        solution_column (`str`, *optional*, defaults to `"solution"`):
            The column with the reference completion, tags included.
        full_marks (`Mapping[str, float]`, *optional*):
            The score of a perfect completion by reward name. The rewards of this package know theirs; for your own,
            say it here or give the callable an attribute `full_marks`.

    Returns:
        `AuditReport`:
            The counts, and every row whose reference does not get full marks. "Not scored" (`None`) is not full marks.

    Raises:
        ValueError: If there are no rows, the column is missing, a reward's full marks are not known, or a reward does
            not return one score a row.
    """
    rows = [dict(row) for row in dataset]
    if not rows:
        raise ValueError("dataset has no rows to audit")
    solutions: list[str] = []
    for index, row in enumerate(rows):
        solution = row.get(solution_column)
        if not isinstance(solution, str):
            raise ValueError(f"row {index} has no text in column {solution_column!r}; its columns are {sorted(row)}")
        solutions.append(solution)
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
    passed: dict[str, int] = {}
    failures: list[AuditRow] = []
    for reward_func in RewardBundle(bundle):
        name = reward_name(reward_func)
        full = (full_marks or {}).get(name, getattr(reward_func, "full_marks", None))
        if full is None:
            raise ValueError(f"the full marks of {name!r} are not known; pass full_marks={{{name!r}: ...}}")
        scores = reward_func(prompts=[row.get("prompt") for row in rows], completions=solutions, **columns)
        if len(scores) != len(rows):
            raise ValueError(f"{name!r} returned {len(scores)} scores for {len(rows)} rows")
        missed = [
            AuditRow(
                index, name, score, full, solutions[index], {k: v for k, v in rows[index].items() if k != "prompt"}
            )
            for index, score in enumerate(scores)
            if score is None or not math.isclose(score, full, rel_tol=1e-9)
        ]
        passed[name] = len(rows) - len(missed)
        failures += missed
    failures.sort(key=lambda failure: failure.row)
    return AuditReport(len(rows), passed, failures)
