"""From padded rows to one packed row in which each prompt stands once, and back. Knows no model.

Where `G` completions answer one prompt, a padded batch holds the prompt `G` times, and pads every row to the longest.
The packed row holds what is left when both are taken out: for each group the prompt without its last token (the
*prefix*), and for each completion a *segment*: the prompt's last token, and the completion without its last token.

    padded   . q r s a b c          packed   q r | t | s a b | s d e f g | u h
             . q r s d e f g                 prefixes  segments of each group
             . . t u h i

So each position of a segment predicts the next token of its completion, and no position has two tokens to predict. A
segment sees its prefix and itself; positions go on from the prefix in each of them. All prefixes come first, then the
segments, group by group, and groups whose prefix is empty are the last. So what is scored is the end of the row, and
what attention over prefixes reads and writes are runs of tokens too.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch


class LayoutError(ValueError):
    """Rows that cannot be packed."""


@dataclass(frozen=True)
class Row:
    """What the place of a padded row in a packed one depends on.

    Args:
        prompt (`Hashable`):
            The same for the same prompt.
        prompt_tokens (`int`), completion_tokens (`int`):
            Its lengths, without padding.
    """

    prompt: Hashable
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Group:
    """Where a prompt and its completions lie in the packed row.

    Args:
        prefix (`range`):
            Positions of the prompt without its last token; may be empty.
        segments (`tuple[range, ...]`):
            Positions of each completion, one after the other; none is empty.
    """

    prefix: range
    segments: tuple[range, ...]


@dataclass(frozen=True)
class PackedLayout:
    """The way from `B` padded rows of `T` tokens to a packed row of `N`, of which `S` predict a completion's token.

    Args:
        tokens (`torch.Tensor`):
            For each token of the packed row its place in the flattened `(B, T)` rows, `(N,)`.
        position_ids (`torch.Tensor`):
            Its position in its own sequence, `(N,)`.
        targets (`torch.Tensor`):
            For each place that predicts a token of a completion, which are the last `S` ones, the place of that token
            in the flattened `(B, C)` completions, `(S,)`.
        pieces (`torch.Tensor`):
            Where prefixes and segments begin, and the end of the row: cumulative lengths, int32.
        prefix_keys (`torch.Tensor`), prefix_queries (`torch.Tensor`):
            The same of the prefixes alone, and of the tokens that see them, the segments of each group together, both
            counted from 0. Int32, of the same length, at least 2.
        longest_piece (`int`), longest_prefix_keys (`int`), longest_prefix_queries (`int`):
            The longest of these, in tokens.
        longest_sequence (`int`):
            Tokens of the longest prompt with its completion, without the completion's last token.
        prefix_end (`int`), shared_end (`int`):
            Where the prefixes end and the segments begin, and where the segments end that have a prefix.
        groups (`tuple[Group, ...]`):
            The groups, in the order of the packed row.
        shape (`tuple[int, int, int]`):
            `B`, `T` and `C`.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    pieces: torch.Tensor
    prefix_keys: torch.Tensor
    prefix_queries: torch.Tensor
    longest_piece: int
    longest_prefix_keys: int
    longest_prefix_queries: int
    longest_sequence: int
    prefix_end: int
    shared_end: int
    groups: tuple[Group, ...]
    shape: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """`N`, the tokens that a forward computes."""
        return self.tokens.numel()

    def pack(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The packed row, `(1, N)`, of tokens `(B, T)`."""
        return input_ids.reshape(-1).index_select(0, self.tokens).unsqueeze(0)

    def scored(self, states: torch.Tensor) -> torch.Tensor:
        """Of a packed row's states `(1, N, ...)` those that predict a token of a completion, `(1, S, ...)`."""
        return states[:, self.prefix_end :]

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The tokens that the scored places predict, `(S,)`, of tokens `(B, T)`."""
        _, _, width = self.shape
        return input_ids[:, -width:].reshape(-1).index_select(0, self.targets)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the scored places, `(S,)`, where they belong in `(B, C)`; 0 elsewhere."""
        num_rows, _, width = self.shape
        rows = values.new_zeros(num_rows * width).index_copy(0, self.targets, values)
        return rows.view(num_rows, width)


def rows_of(prompt_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[Row]:
    """What is to be known of padded rows to lay them out; one copy from their device, which is waited for.

    Args:
        prompt_ids (`torch.Tensor`):
            Prompts, padded on the left, `(B, P)`.
        attention_mask (`torch.Tensor`):
            1 for tokens and 0 for padding, of prompts and of completions, which are padded on the right, `(B, T)`.

    Raises:
        LayoutError: If a row has no prompt, or padding where it does not belong.
    """
    prompt_width = prompt_ids.size(1)
    both = torch.cat([prompt_ids.detach(), attention_mask.detach().to(prompt_ids.dtype)], dim=1).cpu()
    prompts, mask = both[:, :prompt_width].numpy(), both[:, prompt_width:].bool()
    prompt_lengths, completion_lengths = mask[:, :prompt_width].sum(1), mask[:, prompt_width:].sum(1)
    columns = torch.arange(mask.size(1))
    starts, ends = prompt_width - prompt_lengths, prompt_width + completion_lengths
    if not torch.equal(mask, (columns >= starts[:, None]) & (columns < ends[:, None])):
        raise LayoutError("there is padding inside a row: prompts must be padded left and completions right")
    lengths = list(zip(prompt_lengths.tolist(), completion_lengths.tolist(), strict=True))
    for index, (prompt_tokens, _) in enumerate(lengths):
        if prompt_tokens == 0:
            raise LayoutError(f"row {index} has an empty prompt")
    return [
        Row(prompts[index, prompt_width - prompt_tokens :].tobytes(), prompt_tokens, completion_tokens)
        for index, (prompt_tokens, completion_tokens) in enumerate(lengths)
    ]


def lay_out(rows: Sequence[Row], prompt_width: int, num_completion_tokens: int) -> PackedLayout:
    """The layout of rows whose prompts are padded on the left and whose completions are padded on the right.

    Rows with the same prompt form a group wherever they sit in the batch. A completion without a token takes no place;
    if no row has one, a single token of the first prompt is left, so that there is something to compute.

    Args:
        rows (`Sequence[Row]`):
            The `B` rows.
        prompt_width (`int`), num_completion_tokens (`int`):
            Columns of the prompts, `P`, and of the completions, `C`.

    Returns:
        [`PackedLayout`]:
            On the host; [`on_device`] takes it to where the rows are.
    """
    row_width = prompt_width + num_completion_tokens
    rows_of_prompt: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        if row.completion_tokens > 0:
            rows_of_prompt.setdefault(row.prompt, []).append(index)
    # Prefixes and their groups' rows; those without a prefix come last.
    members = sorted(rows_of_prompt.values(), key=lambda indices: rows[indices[0]].prompt_tokens == 1)
    prefix_lengths = [rows[indices[0]].prompt_tokens - 1 for indices in members]
    prefixes = _ranges(prefix_lengths, 0)
    prefix_end = sum(prefix_lengths)

    # Each piece is a run of consecutive tokens of a padded row: where it begins there, its position, its length.
    begins = [
        (indices[0] * row_width + prompt_width - length - 1, 0, length)
        for indices, length in zip(members, prefix_lengths, strict=True)
        if length
    ]
    groups, targets, end = [], [], prefix_end
    for indices, prefix in zip(members, prefixes, strict=True):
        lengths = [rows[index].completion_tokens for index in indices]
        groups.append(Group(prefix, tuple(_ranges(lengths, end))))
        end += sum(lengths)
        for index, length in zip(indices, lengths, strict=True):
            begins.append((index * row_width + prompt_width - 1, len(prefix), length))
            targets.append((index * num_completion_tokens, length))
    if not groups:
        prefix_end, begins, groups = 1, [(prompt_width - 1, 0, 1)], [Group(range(1), ())]
    piece_lengths = [length for _, _, length in begins]
    # What sees a prefix; one empty call where nothing does, so that there is always one.
    shared = [group for group in groups if len(group.prefix) and group.segments]
    keys = [len(group.prefix) for group in shared] or [0]
    queries = [sum(map(len, group.segments)) for group in shared] or [0]
    return PackedLayout(
        tokens=_runs([(begin, length) for begin, _, length in begins]),
        position_ids=_runs([(position, length) for _, position, length in begins]),
        targets=_runs(targets),
        pieces=_cumulative(piece_lengths),
        prefix_keys=_cumulative(keys),
        prefix_queries=_cumulative(queries),
        longest_piece=max(piece_lengths),
        longest_prefix_keys=max(keys),
        longest_prefix_queries=max(queries),
        longest_sequence=max(len(group.prefix) + max(map(len, group.segments), default=0) for group in groups),
        prefix_end=prefix_end,
        shared_end=prefix_end + sum(queries),
        groups=tuple(groups),
        shape=(len(rows), row_width, num_completion_tokens),
    )


def to_device(numbers: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Whole numbers on a device, int64: one copy for all tensors, `(n,)` each, which nobody waits for."""
    together = torch.cat([tensor.long() for tensor in numbers])
    if device.type == "cuda":
        together = together.pin_memory()
    return list(together.to(device, non_blocking=True).split([tensor.numel() for tensor in numbers]))


def on_device(layouts: Sequence[PackedLayout], device: torch.device) -> list[PackedLayout]:
    """Layouts with their tensors on a device: one copy for all of them, which nobody waits for."""
    if device.type == "cpu" or not layouts:
        return list(layouts)
    names = [item.name for item in fields(PackedLayout) if isinstance(getattr(layouts[0], item.name), torch.Tensor)]
    here = [getattr(layout, name) for layout in layouts for name in names]
    there: list[Any] = [copy.to(tensor.dtype) for copy, tensor in zip(to_device(here, device), here, strict=True)]
    return [
        replace(layout, **dict(zip(names, there[start : start + len(names)], strict=True)))
        for layout, start in zip(layouts, range(0, len(there), len(names)), strict=True)
    ]


def packed_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_completion_tokens: int) -> PackedLayout:
    """[`rows_of`], [`lay_out`] and [`on_device`] in one."""
    prompt_width = input_ids.size(1) - num_completion_tokens
    layout = lay_out(rows_of(input_ids[:, :prompt_width], attention_mask), prompt_width, num_completion_tokens)
    return on_device([layout], input_ids.device)[0]


def _ranges(lengths: Sequence[int], start: int) -> list[range]:
    """Runs one after the other."""
    return [range(begin, end) for begin, end in pairwise(accumulate(lengths, initial=start))]


def _runs(runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Consecutive numbers, by first number and length, one after the other."""
    return torch.cat([torch.arange(0), *(torch.arange(begin, begin + length) for begin, length in runs)])


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
