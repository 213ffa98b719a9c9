"""Do a data set's own references get full marks? Where they do not, a reward is grading the right answer as wrong.

[`check_references`] asks it of the first rows, before training; [`audit`] of all of them, with their solutions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

from ._base import Reward, to_tag_pair
from .bundle import RewardBundle, reward_name
from .correctness import AnswerReward, CorrectnessReward
from .extract import HASH_MARKER
from .format import TAGS, SectionsReward
from .numbers import parse_plain_number
from .references import is_missing, reference_to_text


# As many rows with a reference are checked, and as many are gone through to find them.
ROWS_CHECKED = 8
ROWS_READ = 256


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
        not_numbers (`dict[str, list[int]]`):
            For each answer column whose references are compared as numbers, the rows with a reference that is no plain
            number: there an answer is right only character for character.
    """

    rows: int
    passed: dict[str, int]
    failures: list[AuditRow]
    not_numbers: dict[str, list[int]] = field(default_factory=dict)

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

    Example:
    ```python
    >>> from trl_grpo_ext.rewards import get_correctness_reward
    >>> row = {"answer": "14", "solution": "<answer>14</answer>"}
    >>> report = audit([get_correctness_reward()], [row])
    >>> report.ok, report.passed
    (True, {'correctness_reward_func': 1})
    ```
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
    not_numbers: dict[str, list[int]] = {}
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
        if isinstance(reward_func, CorrectnessReward):
            references = map(reference_to_text, columns[reward_func.answer_column])
            not_numbers[reward_func.answer_column] = [
                index
                for index, reference in enumerate(references)
                if reference is not None and parse_plain_number(reference) is None
            ]
    failures.sort(key=lambda failure: failure.row)
    return AuditReport(len(rows), passed, failures, not_numbers)


# How an answer may stand in its section.
_ANSWER_FORMS = ("{answer}", "\\boxed{{{answer}}}", f"{HASH_MARKER} {{answer}}")


def with_solutions(bundle: Iterable[Any], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what a policy would have to write, for [`audit`].

    That is the row's own solution, or else its bare answer in the sections of one of the rewards: whichever of these
    forms the first rows get the most full marks in.

    Args:
        bundle (`Iterable`):
            Rewards. Those that are not of this package have no part in the choice.
        rows (`Iterable[Mapping]`):
            Rows with the columns `answer` and perhaps `solution`.

    Returns:
        `list[dict]`:
            The rows, all with a column `solution`.
    """
    filled = [dict(row) for row in rows]
    if not filled:
        return filled
    rewards: list[Any] = [reward_func for reward_func in bundle if isinstance(reward_func, Reward)]
    sections = [reward_func.pairs for reward_func in rewards if isinstance(reward_func, SectionsReward)]
    sections.append([to_tag_pair("with_solutions", "tags", tag) for tag in TAGS])
    sections += [[*pairs, ("", "")] for pairs in sections if pairs[-1][1]]  # and the answer behind them
    forms: list[Callable[[Mapping[str, Any]], str]] = []
    if all(isinstance(row.get("solution"), str) for row in filled):
        forms.append(itemgetter("solution"))
    forms += [partial(_write, pairs=pairs, form=form) for pairs in [*sections, [("", "")]] for form in _ANSWER_FORMS]
    forms += [partial(_shortest, reward_func=grader) for grader in rewards if isinstance(grader, AnswerReward)]

    def count_full_marks(form: Callable[[Mapping[str, Any]], str]) -> int:
        first = filled[:ROWS_CHECKED]
        columns = {key: [row.get(key) for row in first] for key in first[0] if key not in ("prompt", "completion")}
        scores = [reward_func(completions=list(map(form, first)), **columns) for reward_func in rewards]
        return sum(
            score is not None and math.isclose(score, reward_func.full_marks, rel_tol=1e-9)
            for reward_func, of_reward in zip(rewards, scores, strict=True)
            for score in of_reward
        )

    best = max(forms, key=count_full_marks)  # the first of those that have the most
    return [{**row, "solution": best(row)} for row in filled]


def _shortest(row: Mapping[str, Any], reward_func: AnswerReward) -> str:
    return reward_func.completion_giving(row["answer"]) or ""


def _write(row: Mapping[str, Any], pairs: list[tuple[str, str]], form: str) -> str:
    answer = form.format(answer=row["answer"])
    contents = [f"It is {row['answer']}."] * (len(pairs) - 1) + [answer]
    parts = [
        part
        for (opening, closing), content in zip(pairs, contents, strict=True)
        for part in (opening, content, closing)
    ]
    return "\n".join(filter(None, parts))


def check_references(
    reward_funcs: Any,
    dataset: Iterable[Mapping[str, Any]] | None,
    *,
    dataset_name: str = "train_dataset",
    may_lack_column: bool = False,
) -> None:
    """Raise unless the answer rewards of this package can grade a data set: a look at its first rows.

    Each reward must find its answer column, and give a completion with the row's own reference in its tag full marks.
    [`GRPOExtTrainer`] does this when it is made; with TRL's own trainer, call it before. Rewards that are not of this
    package are not looked at.

    Args:
        reward_funcs (`RewardBundle`, `list` or a reward):
            What is passed to the trainer.
        dataset (`datasets.Dataset`, `datasets.IterableDataset`, an iterable of dicts or `None`):
            The rows. Nothing is checked where there is no data set. A stream is read from its beginning, and is
            afterwards where it was before.
        dataset_name (`str`, *optional*, defaults to `"train_dataset"`):
            What the message calls it.
        may_lack_column (`bool`, *optional*, defaults to `False`):
            Whether the column may come from elsewhere (a `rollout_func` can add some).

    Raises:
        ValueError: If a column is missing, no row has a reference, or a reference does not get full marks. Rows
            without a reference are legal beside others: they are not scored.
        TypeError: If `dataset` is an iterator, which looking at would use up.
    """
    if not isinstance(reward_funcs, list | tuple):
        reward_funcs = [reward_funcs]
    answer_rewards = [reward_func for reward_func in reward_funcs if isinstance(reward_func, AnswerReward)]
    if not answer_rewards or dataset is None:
        return
    if isinstance(dataset, Iterator):
        raise TypeError(f"{dataset_name} is an iterator, which looking at would use up: pass a list or a data set")
    if not hasattr(dataset, "__len__") and hasattr(dataset, "take"):
        dataset = dataset.take(ROWS_READ)  # a stream of its own: the data set's place does not change
    rows: list[Mapping[str, Any]] = []
    num_references = 0
    for row in islice(dataset, ROWS_READ):
        if not isinstance(row, Mapping):
            raise TypeError(f"{dataset_name} gives {_describe(row)} where a row, a dict, is expected: choose a split")
        rows.append(row)
        num_references += any(not is_missing(row.get(reward_func.answer_column)) for reward_func in answer_rewards)
        if num_references == ROWS_CHECKED:
            break
    if not rows:
        raise ValueError(f"{dataset_name} has no rows")
    for reward_func in answer_rewards:
        _check_rows(reward_func, rows, dataset_name, may_lack_column)


def _check_rows(
    reward_func: AnswerReward, rows: list[Mapping[str, Any]], dataset_name: str, may_lack_column: bool
) -> None:
    name, column = reward_func.name, reward_func.answer_column
    other_column = "or name another one with the answer_column option of the reward's factory"
    num_scored = 0
    for index, row in enumerate(rows):
        if column not in row:
            if may_lack_column:
                return
            raise ValueError(
                f"{name} compares answers with the column {column!r}, which row {index} of {dataset_name} does not "
                f"have (its columns are {', '.join(sorted(row))}): add it, {other_column}"
            )
        if is_missing(row[column]):
            continue
        reference = reference_to_text(row[column])
        if reference is None:
            raise ValueError(
                f"{name} cannot compare answers with row {index} of {dataset_name}, column {column!r}: it holds "
                f"{_describe(row[column])} and must hold a text or a number; change the column, {other_column}"
            )
        completion = reward_func.completion_giving(reference)
        if completion is None:  # only the user's function knows how answers are written
            num_scored += 1
            continue
        columns: dict[str, Any] = {column: [row[column]]}
        (score,) = reward_func(completions=[completion], **columns)
        if score is None or not math.isclose(score, reward_func.full_marks, rel_tol=1e-9):
            raise ValueError(
                f"{name} gives row {index} of {dataset_name} {score} of {reward_func.full_marks:g} for its own "
                f"reference, {_describe(reference)} in column {column!r}: a reference is the bare answer, without "
                f"tags; change the column, {other_column}"
            )
        num_scored += 1
    if num_scored == 0 and not may_lack_column:
        raise ValueError(
            f"{name} compares answers with the column {column!r}, which is empty in each of the first {len(rows)} "
            f"rows of {dataset_name}, so that none would be scored: fill it, {other_column}"
        )


def _describe(value: Any) -> str:
    """A value for a message: its kind and its beginning, on one line."""
    text = value if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return repr(text) if isinstance(value, str) else f"a {type(value).__name__} ({text})"
