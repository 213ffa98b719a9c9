"""Rows of a micro-batch, as TRL's dictionary has them: what they add to the gradient, and a few steps with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..shared_prefix.layout import LayoutError, Row, rows_of


MicroBatch = dict[str, Any]


def loss_mask(rows: MicroBatch) -> torch.Tensor:
    """1 for the tokens that count, `(B, C)`: of the completion, and not a tool's."""
    if rows.get("tool_mask") is None:
        return rows["completion_mask"]
    return rows["completion_mask"] * rows["tool_mask"]


def column_advantages(rows: MicroBatch) -> torch.Tensor:
    """Advantages that broadcast over tokens: `(B, 1)`, or `(B, C)` where each token has one of its own."""
    advantages = rows["advantages"]
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def carries_gradient(rows: MicroBatch) -> torch.Tensor:
    """Which rows add anything to the gradient without a KL term: advantage not 0, and a token that counts. `(B,)`.

    Unless they weigh nothing, see [`has_weight`].
    """
    return ((column_advantages(rows) != 0) & loss_mask(rows).bool()).any(dim=1)


def has_weight(rows: MicroBatch) -> torch.Tensor:
    """Which rows have a token that counts and does not weigh 0; all where nothing is known of weights. `(B,)`."""
    counts, weights = loss_mask(rows).bool(), rows.get("importance_sampling_ratio")
    return torch.ones_like(counts[:, 0]) if weights is None else ((weights != 0) & counts).any(dim=1)


def logps_of_completions(
    forwards: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: MicroBatch
) -> torch.Tensor | None:
    """The log-probabilities of a micro-batch's completions, `(B, C)`, from the first of some forwards that has them.

    Args:
        forwards (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
            Token ids, `(B, T)`, and the log-probabilities of the last of them, `(B, C)` or without the last columns in
            which all rows are padded.
        rows (`dict`):
            The micro-batch.
    """
    completion_ids, mask = rows["completion_ids"], rows["completion_mask"]
    for input_ids, logps in forwards:
        width = logps.size(1)
        if (
            len(logps) == len(completion_ids)
            and width <= completion_ids.size(1)
            and torch.equal(input_ids[:, -width:], completion_ids[:, :width])
            and not mask[:, width:].any()
        ):
            return torch.nn.functional.pad(logps, (0, completion_ids.size(1) - width))
    return None


def num_rows(rows: MicroBatch) -> int:
    """How many rows a micro-batch has."""
    return int(rows["completion_ids"].size(0))


def kinds_of(rows: MicroBatch) -> dict[str, str]:
    """Of what each tensor has an entry: a token of the prompt, one of the completion, or a row."""
    prompt, completion = rows["prompt_ids"].shape, rows["completion_ids"].shape
    kinds = {}
    for key, value in rows.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            continue
        if key.startswith("prompt_") and value.shape == prompt:
            kinds[key] = "prompt"
        elif not key.startswith("prompt_") and value.shape == completion:
            kinds[key] = "completion"
        else:
            kinds[key] = "row"
    return kinds


def concatenate(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """The rows of several micro-batches as one; what is not by rows is the first one's."""

    def joined(key: str, first: Any) -> Any:
        if isinstance(first, torch.Tensor) and first.ndim > 0:
            return torch.cat([micro_batch[key] for micro_batch in micro_batches])
        return first

    return {key: joined(key, value) for key, value in micro_batches[0].items()}


def select(rows: MicroBatch, indices: torch.Tensor | slice) -> MicroBatch:
    """Some of the rows."""

    def selected(value: torch.Tensor) -> torch.Tensor:
        return value[indices.to(value.device) if isinstance(indices, torch.Tensor) else indices]

    return {
        key: selected(value) if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for key, value in rows.items()
    }


def empty_row(rows: MicroBatch) -> MicroBatch:
    """What is computed where there is no row: a prompt of one token, and a completion of one that does not count."""
    empty: MicroBatch = {}
    for key, value in rows.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            empty[key] = value
        elif key.startswith("prompt_"):
            empty[key] = value[:1, -1:]
        else:
            empty[key] = value[:1, :1] if value.ndim > 1 else value[:1]
    empty["completion_mask"] = torch.zeros_like(empty["completion_mask"])
    return empty


# What the host knows of rows


@dataclass(frozen=True)
class RowOnHost:
    """What is to be known of a row to say where it is computed.

    Args:
        row (`Row` or `None`):
            Its prompt and lengths; `None` if it cannot be packed, because it has no prompt, or padding inside.
        used_columns (`int`):
            Columns of the completion up to the last token.
    """

    row: Row | None
    used_columns: int


# Of what is computed where there is no row.
EMPTY_ROW = RowOnHost(Row(None, 1, 0), 1)


def on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Whole numbers on the host: one copy for all of them, which is waited for."""
    flat = torch.cat([tensor.reshape(-1).long() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def rows_on_host(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_mask: torch.Tensor
) -> list[RowOnHost]:
    """What is known of the rows of a micro-batch by tensors that are on the host, `(B, P)` and `(B, C)`."""
    columns = torch.arange(1, completion_mask.size(1) + 1)
    used = (completion_mask.bool() * columns).amax(1).tolist()
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    rows: Sequence[Row | None]
    try:
        rows = rows_of(prompt_ids, mask)
    except LayoutError:  # where it is packed, this is said
        rows = [None] * len(used)
    return [RowOnHost(row, columns) for row, columns in zip(rows, used, strict=True)]
