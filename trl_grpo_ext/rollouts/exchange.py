"""Rows from rank to rank: each process makes the same plan, and sends what others compute straight to them.

What the plan goes by is one small call: lengths, and a digest of each prompt. Rows then go point to point, in three
calls of `all_to_all_single` (prompts, completions, what is one for a row), without padding: each is sent once at most.
Nothing here waits for a GPU but the first call.
"""

import hashlib
import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import distributed

from ..shared_prefix.layout import Row, to_device
from .balance import NOWHERE, Cost, RowTable, ranks_of_rows, slowest_over_mean, work_of_ranks
from .rows import MicroBatch, RowOnHost, kinds_of


_DIGEST_BYTES = 8
# Numbers of a process before those of its rows: what these are made of, the tokens of a padded micro-batch, and
# whether it can share prompts.
_HEADER = 3


@dataclass(frozen=True)
class Ranks:
    """The processes that rows are dealt out to.

    Args:
        accelerator (`Accelerator`):
            What they call each other with.
        pad_token_id (`int`):
            Fills prompts and completions that get wider.
        work_of_a_pair (`int`):
            See [`~trl_grpo_ext.rollouts.balance.Cost`].
    """

    accelerator: Accelerator
    pad_token_id: int = 0
    work_of_a_pair: int = 0

    def gather(self, numbers: torch.Tensor) -> np.ndarray:
        """Whole numbers of all processes, `(n,)` to `(processes, n)`; equally many of each."""
        gathered: torch.Tensor = self.accelerator.gather(numbers.to(self.accelerator.device))
        return gathered.view(self.accelerator.num_processes, -1).cpu().numpy()


class ExchangeFigures(NamedTuple):
    """What an exchange was.

    Args:
        num_moved (`int`):
            Rows that have moved, of all processes.
        sent_bytes (`int`):
            What this process has sent.
        seconds (`float`):
            How long planning and sending took here.
        slowest_before (`float`):
            Tokens of the slowest rank over the mean, had rows stayed.
    """

    num_moved: int
    sent_bytes: int
    seconds: float
    slowest_before: float


class Balanced(NamedTuple):
    """Rows after they were dealt out to ranks.

    Args:
        rows (`dict`), known (`list[RowOnHost]`):
            The rows that were here, and behind them those that have come.
        orders (`list[list[int]]`):
            For each optimizer step the numbers of those that are computed here.
        by_prompt (`bool`):
            Whether all processes share prompts.
        padded_tokens (`int`):
            Tokens of the largest padded micro-batch of any process.
        figures ([`ExchangeFigures`]):
            What it took.
    """

    rows: MicroBatch
    known: list[RowOnHost]
    orders: list[list[int]]
    by_prompt: bool
    padded_tokens: int
    figures: ExchangeFigures


class _Moves(NamedTuple):
    """Rows that go and come: numbers in the table, by the rank on the other side, and how many are of each."""

    table: RowTable
    first: int  # of this process's rows
    sent: np.ndarray
    came: np.ndarray
    to_ranks: np.ndarray
    from_ranks: np.ndarray


def balance(
    rows: MicroBatch,
    known: Sequence[RowOnHost],
    steps: Sequence[int],
    is_kept: Sequence[bool],
    ranks: Ranks,
    *,
    by_prompt: bool,
    padded_tokens: int,
) -> Balanced | None:
    """Deal the rows of all processes out to them, so that each has about equal work in each optimizer step.

    Args:
        rows (`dict`), known (`Sequence[RowOnHost]`):
            The rows of this process.
        steps (`Sequence[int]`), is_kept (`Sequence[bool]`):
            Of each row, its optimizer step, and whether it is computed.
        ranks ([`Ranks`]):
            The processes. All of them come here together, with equally many rows each.
        by_prompt (`bool`):
            Whether this process could compute rows with their prompts shared. Where one cannot, as with rows that are
            longer than a sliding window, none is taken to.
        padded_tokens (`int`):
            Tokens of a padded micro-batch.

    Returns:
        [`Balanced`] or `None`:
            `None` if processes have other kinds of rows than each other, which cannot be put together.
    """
    rank, num_ranks = ranks.accelerator.process_index, ranks.accelerator.num_processes
    kinds, count = kinds_of(rows), len(known)
    prompt_columns = rows["prompt_ids"].size(1)
    own = [
        [step, *_numbers(row, prompt_columns), int(kept)]
        for step, row, kept in zip(steps, known, is_kept, strict=True)
    ]
    header = [_signature(rows, kinds), padded_tokens, int(by_prompt)]
    gathered = ranks.gather(torch.tensor([*header, *chain.from_iterable(own)]))
    headers, numbers = gathered[:, :_HEADER], gathered[:, _HEADER:].reshape(num_ranks * count, -1)
    if (headers[:, 0] != headers[0, 0]).any():
        return None
    began = time.perf_counter()
    by_prompt = bool(headers[:, 2].all())
    step, prompt, _, prompt_tokens, completion_tokens, _, kept = numbers.T
    table = RowTable(np.repeat(np.arange(num_ranks), count), step, prompt, prompt_tokens, completion_tokens, kept)
    cost = Cost(by_prompt, ranks.work_of_a_pair, int(prompt_tokens.max()))
    dealt = ranks_of_rows(table, num_ranks, cost)
    first, moves = rank * count, (dealt != NOWHERE) & (dealt != table.rank)
    sent = first + np.flatnonzero(moves[first : first + count])
    sent = sent[np.argsort(dealt[sent], kind="stable")]
    came = np.flatnonzero(moves & (dealt == rank))
    counts = (np.bincount(others, minlength=num_ranks) for others in (dealt[sent], table.rank[came]))
    widths = int(prompt_tokens.max()), max(1, int(completion_tokens.max()))
    wider = _widened(rows, kinds, widths, ranks.pad_token_id)
    received, sent_bytes = _exchanged(wider, kinds, _Moves(table, first, sent, came, *counts), ranks.pad_token_id)
    here = [*range(first, first + count), *came.tolist()]
    place = {number: index for index, number in enumerate(here)}
    stays = np.where(dealt == NOWHERE, NOWHERE, table.rank)
    tokens = Cost(by_prompt, 0, cost.prompt_columns)
    return Balanced(
        {key: torch.cat([value, received[key]]) if key in kinds else value for key, value in wider.items()},
        [_known(*numbers[number, 1:-1].tolist()) for number in here],
        [
            [place[number] for number in np.flatnonzero((dealt == rank) & (step == each)).tolist()]
            for each in range(max(steps) + 1)
        ],
        by_prompt,
        int(headers[:, 1].max()),
        ExchangeFigures(
            int(moves.sum()),
            sent_bytes,
            time.perf_counter() - began,
            slowest_over_mean(work_of_ranks(table, stays, num_ranks, tokens)),
        ),
    )


# What processes tell each other


def _numbers(row: RowOnHost, prompt_columns: int) -> list[int]:
    """What is known of a row: its prompt in two numbers, columns that are used, and whether it can be packed."""
    if row.row is None:
        return [0, 0, prompt_columns, row.used_columns, 0]
    return [*_digest(row.row.prompt), row.row.prompt_tokens, row.used_columns, 1]


def _known(low: int, high: int, prompt_columns: int, used_columns: int, can_be_packed: int) -> RowOnHost:
    """The row whose [`_numbers`] these are."""
    return RowOnHost(Row((low, high), prompt_columns, used_columns) if can_be_packed else None, used_columns)


def _digest(prompt: Hashable) -> tuple[int, int]:
    """Two numbers for a prompt, the same on all processes: so many bits that no two prompts of a run have the same."""
    assert isinstance(prompt, bytes)  # as `rows_of` has them
    digest = hashlib.blake2b(prompt, digest_size=2 * _DIGEST_BYTES).digest()
    low, high = (int.from_bytes(half, "big", signed=True) for half in (digest[:_DIGEST_BYTES], digest[_DIGEST_BYTES:]))
    return low, high


def _signature(rows: MicroBatch, kinds: dict[str, str]) -> int:
    """A number for what rows are made of; rows with the same can be put together."""
    parts = []
    for key in sorted(rows):
        value = rows[key]
        if key in kinds:
            shape = tuple(value.shape[1:]) if kinds[key] == "row" else ()
            parts.append((key, str(value.dtype), kinds[key], shape))
        else:
            parts.append((key, "", "", ()))
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=_DIGEST_BYTES).digest()
    return int.from_bytes(digest, "big", signed=True)


# Rows


def _widened(rows: MicroBatch, kinds: dict[str, str], widths: tuple[int, int], pad_token_id: int) -> MicroBatch:
    """Rows with so many columns of prompt, padded on the left, and of completion, padded on the right."""

    def widened(key: str, value: Any) -> Any:
        kind = kinds.get(key)
        if kind not in ("prompt", "completion"):
            return value
        more = widths[kind == "completion"] - value.size(1)
        return torch.nn.functional.pad(
            value, (more, 0) if kind == "prompt" else (0, more), value=_fill(key, pad_token_id)
        )

    return {key: widened(key, value) for key, value in rows.items()}


def _exchanged(rows: MicroBatch, kinds: dict[str, str], moves: _Moves, pad_token_id: int) -> tuple[MicroBatch, int]:
    """The rows that have come, as wide as those of this process, and the bytes that were sent."""
    device, num_came = rows["completion_ids"].device, len(moves.came)
    columns = {"prompt": rows["prompt_ids"].size(1), "completion": rows["completion_ids"].size(1), "row": 1}
    lengths = {
        "prompt": moves.table.prompt_tokens,
        "completion": moves.table.completion_tokens,
        "row": np.ones_like(moves.table.rank),
    }

    def places(numbers: np.ndarray, among: np.ndarray, kind: str) -> torch.Tensor:
        """Where the entries of rows are in a tensor `(rows * columns,)`, one row after the other."""
        length = lengths[kind][numbers]
        starts = among * columns[kind] + (columns[kind] - length if kind == "prompt" else 0)
        offsets = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        return torch.from_numpy(np.repeat(starts, length) + offsets)

    places_of_kinds = [
        each
        for kind in columns
        for each in (
            places(moves.sent, moves.sent - moves.first, kind),
            places(moves.came, np.arange(num_came), kind),
        )
    ]
    on_device = to_device(places_of_kinds, device)
    received, sent_bytes = {}, 0
    for kind, going, coming in zip(columns, on_device[::2], on_device[1::2], strict=True):
        flat = {
            key: value if kind == "row" else value.flatten() for key, value in rows.items() if kinds.get(key) == kind
        }
        entries = [_as_bytes(values.index_select(0, going)) for values in flat.values()]
        outgoing = torch.cat(entries, dim=1)
        incoming = outgoing.new_empty((coming.numel(), outgoing.size(1)))
        sizes = (_sums(lengths[kind][moves.came], moves.from_ranks), _sums(lengths[kind][moves.sent], moves.to_ranks))
        distributed.all_to_all_single(incoming, outgoing, *sizes)
        sent_bytes += outgoing.numel()
        of_keys = incoming.split([entry.size(1) for entry in entries], dim=1)
        for (key, values), part in zip(flat.items(), of_keys, strict=True):
            came = part.flatten().clone().view(values.dtype).view(-1, *values.shape[1:])  # a copy is aligned
            if kind != "row":
                size, fill = num_came * columns[kind], _fill(key, pad_token_id)
                padded = torch.full((size,), fill, dtype=came.dtype, device=device)
                came = padded.index_copy_(0, coming, came).view(num_came, columns[kind])
            received[key] = came
    return received, sent_bytes


def _fill(key: str, pad_token_id: int) -> int:
    """What padding is of."""
    return pad_token_id if key.endswith("_ids") else 0


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    """`(n, ...)` as `(n, bytes)`."""
    return values.reshape(len(values), math.prod(values.shape[1:])).contiguous().view(torch.uint8)


def _sums(values: np.ndarray, counts: np.ndarray) -> list[int]:
    """Sums over consecutive runs of so many values."""
    ends = np.concatenate([[0], np.cumsum(values)])[np.concatenate([[0], np.cumsum(counts)])]
    return np.diff(ends).tolist()
