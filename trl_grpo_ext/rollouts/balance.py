"""Which rank computes which row: what is known of all ranks' rows in, a rank for each row out. Knows no tensors.

A step takes as long as its slowest rank, so ranks get about equal work: whole groups go to the rank that has the least
by then, the heaviest group first (LPT, the longest processing time first: Graham, 1969), and then single rows from the
rank with the most to the one with the least, as long as that makes the most less. Groups of more than two ranks' work
are halved before. Work is counted in whole numbers, because every rank makes the same plan by itself.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


# Of the work of a token apart from attention; what a token does with another one that it sees is a fraction of it.
WORK_OF_A_TOKEN = 2**20
NOWHERE = -1
# A row moves to a rank that has to compute its prompt once more if the slowest gains at least this share of that.
_WORTH_OF_A_PROMPT = 0.1


@dataclass(frozen=True)
class RowTable:
    """What is known of the rows of all ranks: a number a row each, `(R,)`, int64.

    Args:
        rank (`numpy.ndarray`):
            Where they were generated.
        step (`numpy.ndarray`):
            Their optimizer step within the generation batch.
        prompt (`numpy.ndarray`):
            The same for the same prompt.
        prompt_tokens (`numpy.ndarray`), completion_tokens (`numpy.ndarray`):
            Their lengths, without padding.
        is_kept (`numpy.ndarray`):
            1 if they are computed at all.
    """

    rank: np.ndarray
    step: np.ndarray
    prompt: np.ndarray
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray
    is_kept: np.ndarray

    def __len__(self) -> int:
        return len(self.rank)


@dataclass(frozen=True)
class Cost:
    """What rows cost.

    Args:
        by_prompt (`bool`):
            Whether rows of a prompt that are computed on a rank share it; else each has its own, and its padding.
        work_of_a_pair (`int`):
            Work of a token that sees another one, in the unit in which a token is `WORK_OF_A_TOKEN`.
        prompt_columns (`int`):
            Columns of prompts, to which they are padded where they are not shared.
    """

    by_prompt: bool
    work_of_a_pair: int = 0
    prompt_columns: int = 0

    def of_prompts(self, tokens: np.ndarray) -> np.ndarray:
        """The work of prompts that are shared, without their last tokens, which belong to the rows."""
        prefix = tokens - 1
        return WORK_OF_A_TOKEN * prefix + self.work_of_a_pair * (prefix * prefix // 2)

    def of_rows(self, prompt_tokens: np.ndarray, completion_tokens: np.ndarray) -> np.ndarray:
        """The work of rows; where prompts are shared, without theirs."""
        if self.by_prompt:
            pairs = completion_tokens * (prompt_tokens - 1) + completion_tokens * completion_tokens // 2
            return WORK_OF_A_TOKEN * completion_tokens + self.work_of_a_pair * pairs
        tokens = self.prompt_columns + np.maximum(completion_tokens, 1)
        return WORK_OF_A_TOKEN * tokens + self.work_of_a_pair * (tokens * tokens // 2)


def work_of_a_pair(config: Any) -> int:
    """[`Cost.work_of_a_pair`] of a transformer, by its configuration; 0 where that does not say what it is made of.

    A token takes two operations for each weight that it meets, and four for each number of a query's heads and each
    token that it sees.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return 0
    hidden, layers, heads, feed_forward, vocabulary = map(int, sizes)  # type: ignore[arg-type]
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        feed_forward = experts * (getattr(config, "moe_intermediate_size", None) or feed_forward)
    weights = layers * hidden * (2 * head_size * (heads + key_heads) + 3 * feed_forward) + hidden * vocabulary
    return round(WORK_OF_A_TOKEN * 4 * layers * heads * head_size / (2 * weights))


def ranks_of_rows(table: RowTable, num_ranks: int, cost: Cost) -> np.ndarray:
    """The rank that computes each row, `(R,)`; `NOWHERE` for those that are not computed.

    Rows stay in their optimizer step, and those without a token on their rank. Of equally good plans one is made in
    which few rows move.
    """
    ranks = np.where(table.is_kept.astype(bool), table.rank, NOWHERE)
    moves = (ranks != NOWHERE) & (table.completion_tokens > 0)
    for step in np.unique(table.step[moves]):
        rows = np.flatnonzero(moves & (table.step == step))
        shares = _balanced(*_groups(table, rows, cost), num_ranks)
        for rank, share in zip(_homes(table.rank, shares, num_ranks), shares, strict=True):
            ranks[share] = rank
    return ranks


def work_of_ranks(table: RowTable, ranks: np.ndarray, num_ranks: int, cost: Cost) -> np.ndarray:
    """The work of each rank in each optimizer step, `(steps, ranks)`, of rows that are computed on these ranks."""
    rows = np.flatnonzero((ranks != NOWHERE) & (table.completion_tokens > 0))
    steps, step = np.unique(table.step, return_inverse=True)
    work = np.zeros((len(steps), num_ranks), dtype=np.int64)
    of_rows = cost.of_rows(table.prompt_tokens[rows], table.completion_tokens[rows])
    np.add.at(work, (step[rows], ranks[rows]), of_rows)
    if cost.by_prompt:  # once on each rank where one of its rows is
        rows = rows[np.lexsort((table.prompt[rows], ranks[rows], step[rows]))]
        keys = np.stack([step[rows], ranks[rows], table.prompt[rows]])
        firsts = rows[np.flatnonzero((np.diff(keys, prepend=keys[:, :1] - 1) != 0).any(axis=0))]
        np.add.at(work, (step[firsts], ranks[firsts]), cost.of_prompts(table.prompt_tokens[firsts]))
    return work


def slowest_over_mean(work: np.ndarray) -> float:
    """How much longer steps take than if each rank had the mean of their work, `(steps, ranks)`; 1 is best."""
    mean = work.mean(axis=1).sum()
    return float(work.max(axis=1).sum() / mean) if mean else 1.0


@dataclass
class _Group:
    """Rows of a prompt, as numbers in the table, and the work of the prompt and of each row."""

    prompt_work: int
    rows: list[int]
    row_work: list[int]


def _groups(table: RowTable, rows: np.ndarray, cost: Cost) -> tuple[list[_Group], dict[int, int]]:
    """Rows that share something, and the work of each row."""
    row_work = cost.of_rows(table.prompt_tokens[rows], table.completion_tokens[rows])
    work = dict(zip(rows.tolist(), row_work.tolist(), strict=True))
    if not cost.by_prompt:
        return [_Group(0, [row], [of_row]) for row, of_row in work.items()], work
    _, firsts, inverse = np.unique(table.prompt[rows], return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    ends = np.searchsorted(inverse[order], np.arange(len(firsts) + 1)).tolist()
    prompt_work = cost.of_prompts(table.prompt_tokens[rows[firsts]]).tolist()
    members, works = rows[order].tolist(), row_work[order].tolist()
    return [
        _Group(of_prompt, members[start:end], works[start:end])
        for of_prompt, (start, end) in zip(prompt_work, pairwise(ends), strict=True)
    ], work


def _balanced(groups: Sequence[_Group], work: dict[int, int], num_shares: int) -> list[list[int]]:
    """Rows of each share."""
    parts: list[dict[int, list[int]]] = [{} for _ in range(num_shares)]  # rows by group
    loads = [0] * num_shares
    lightest = [(0, share) for share in range(num_shares)]
    for of_rows, number, rows in sorted(_pieces(groups, num_shares), key=lambda piece: -piece[0]):
        load, share = lightest[0]
        loads[share] = load + of_rows + (0 if number in parts[share] else groups[number].prompt_work)
        parts[share].setdefault(number, []).extend(rows)
        heapq.heapreplace(lightest, (loads[share], share))
    heaviest = [(-load, share) for share, load in enumerate(loads)]
    heapq.heapify(heaviest)
    while True:
        # Heaps keep what loads were; what is no more so is dropped when it comes up.
        while -heaviest[0][0] != loads[heaviest[0][1]]:
            heapq.heappop(heaviest)
        while lightest[0][0] != loads[lightest[0][1]]:
            heapq.heappop(lightest)
        giver, taker = heaviest[0][1], lightest[0][1]
        best = None
        most = loads[giver]
        for number, rows in parts[giver].items():
            saved = groups[number].prompt_work if len(rows) == 1 else 0
            added = 0 if number in parts[taker] else groups[number].prompt_work
            for row in rows:
                after = loads[giver] - work[row] - saved, loads[taker] + work[row] + added
                gain = loads[giver] - max(after)
                if max(after) < most and gain >= _WORTH_OF_A_PROMPT * (added - saved):
                    best, most = (number, row, after), max(after)
        if best is None:
            return [[row for rows in part.values() for row in rows] for part in parts]
        number, row, (loads[giver], loads[taker]) = best
        parts[giver][number].remove(row)
        if not parts[giver][number]:
            del parts[giver][number]
        parts[taker].setdefault(number, []).append(row)
        for share in (giver, taker):
            heapq.heappush(heaviest, (-loads[share], share))
            heapq.heappush(lightest, (loads[share], share))


def _pieces(groups: Sequence[_Group], num_shares: int) -> list[tuple[int, int, list[int]]]:
    """Groups, as the work of rows, number and rows; those that are far too large for a share in halves of halves."""
    mean = sum(group.prompt_work + sum(group.row_work) for group in groups) / num_shares
    pieces = []
    for number, group in enumerate(groups):
        halves = [(group.rows, group.row_work)]
        while halves:
            rows, row_work = halves.pop()
            total = group.prompt_work + sum(row_work)
            is_cheap = group.prompt_work <= _WORTH_OF_A_PROMPT * total
            if total > 2 * mean and len(rows) > 1 and is_cheap:
                middle = len(rows) // 2
                halves += [(rows[:middle], row_work[:middle]), (rows[middle:], row_work[middle:])]
            else:
                pieces.append((sum(row_work), number, rows))
    return pieces


def _homes(origins: np.ndarray, shares: Sequence[Sequence[int]], num_ranks: int) -> list[int]:
    """A rank for each share: where most of its rows are already, as far as that rank is free."""
    lengths = [len(share) for share in shares]
    pairs = np.repeat(np.arange(len(shares)), lengths) * num_ranks
    pairs += origins[np.array([row for share in shares for row in share], dtype=np.int64)]
    found, counts = np.unique(pairs, return_counts=True)
    homes: dict[int, int] = {}
    taken = set()
    for place in np.argsort(-counts, kind="stable").tolist():
        share, rank = divmod(int(found[place]), num_ranks)
        if share not in homes and rank not in taken:
            homes[share] = rank
            taken.add(rank)
    free = iter(rank for rank in range(num_ranks) if rank not in taken)
    return [homes[share] if share in homes else next(free) for share in range(len(shares))]
