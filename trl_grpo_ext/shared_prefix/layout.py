"""From padded rows to one packed row in which each prompt stands once, and back. Knows no model.

Where `G` completions answer one prompt, a padded batch holds the prompt `G` times, and pads every row to the longest.
The packed row holds what is left when both are taken out: for each group the prompt without its last token (the
*prefix*), and for each completion a *segment*: the prompt's last token, and the completion without its last token.

    padded   . q r s a b c          packed   q r | s a b | s d e f g
             . q r s d e f g                 prefix  segment  segment

So each position of a segment predicts the next token of its completion, and no position has two tokens to predict. A
segment sees its prefix and itself; positions go on from the prefix in each of them.
"""

from dataclasses import dataclass

import torch


class LayoutError(ValueError):
    """Rows that cannot be packed."""


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
        scored (`torch.Tensor`):
            Places in the packed row that predict a token of a completion, `(S,)`.
        targets (`torch.Tensor`):
            For each of them, the place of the predicted token in the flattened `(B, C)` completions, `(S,)`.
        groups (`tuple[Group, ...]`):
            The groups, in the order of the packed row.
        shape (`tuple[int, int, int]`):
            `B`, `T` and `C`.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor
    groups: tuple[Group, ...]
    shape: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """`N`, the tokens that a forward computes."""
        return self.tokens.numel()

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with its completion, without the completion's last token."""
        return max(len(group.prefix) + max(map(len, group.segments), default=0) for group in self.groups)

    def pack(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The packed row, `(1, N)`, of tokens `(B, T)`."""
        return input_ids.reshape(-1)[self.tokens].unsqueeze(0)

    def labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The tokens that the `scored` places predict, `(S,)`."""
        _, _, width = self.shape
        return input_ids[:, -width:].reshape(-1)[self.targets]

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the `scored` places, `(S,)`, where they belong in `(B, C)`; 0 elsewhere."""
        num_rows, _, width = self.shape
        rows = values.new_zeros(num_rows * width).index_copy(0, self.targets, values)
        return rows.view(num_rows, width)


def packed_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_completion_tokens: int) -> PackedLayout:
    """Lay out rows whose prompts are padded on the left and whose completions are padded on the right.

    Rows with the same prompt form a group wherever they sit in the batch. A completion without a token takes no place;
    if no row has one, a single token of the first prompt is left, so that there is something to compute.

    Args:
        input_ids (`torch.Tensor`):
            Prompts and completions, `(B, T)`.
        attention_mask (`torch.Tensor`):
            1 for tokens and 0 for padding, `(B, T)`.
        num_completion_tokens (`int`):
            Columns of the completions, `C`.

    Raises:
        LayoutError: If a row has no prompt, or padding where it does not belong.
    """
    num_rows, row_width = input_ids.shape
    prompt_width = row_width - num_completion_tokens
    ids, mask = input_ids.detach().cpu(), attention_mask.detach().cpu().bool()
    prompt_lengths = mask[:, :prompt_width].sum(1).tolist()
    completion_lengths = mask[:, prompt_width:].sum(1).tolist()
    columns = torch.arange(row_width)
    starts = prompt_width - torch.tensor(prompt_lengths)
    ends = prompt_width + torch.tensor(completion_lengths)
    if not torch.equal(mask, (columns >= starts[:, None]) & (columns < ends[:, None])):
        raise LayoutError("there is padding inside a row: prompts must be padded left and completions right")
    if min(prompt_lengths) == 0:
        raise LayoutError(f"row {prompt_lengths.index(0)} has an empty prompt")

    rows_of_prompt: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(prompt_lengths):
        if completion_lengths[row] > 0:
            prompt = tuple(ids[row, prompt_width - length : prompt_width].tolist())
            rows_of_prompt.setdefault(prompt, []).append(row)

    # Each piece is a run of consecutive tokens of a padded row.
    tokens, position_ids, scored, targets, groups = [], [], [], [], []
    end = 0
    for prompt, rows in rows_of_prompt.items():
        last = len(prompt) - 1
        begin_of_prompt = rows[0] * row_width + prompt_width - len(prompt)
        tokens.append(torch.arange(begin_of_prompt, begin_of_prompt + last))
        position_ids.append(torch.arange(last))
        prefix, end = range(end, end + last), end + last
        segments = []
        for row in rows:
            length = completion_lengths[row]
            begin = row * row_width + prompt_width - 1
            tokens.append(torch.arange(begin, begin + length))
            position_ids.append(torch.arange(last, last + length))
            scored.append(torch.arange(end, end + length))
            targets.append(torch.arange(row * num_completion_tokens, row * num_completion_tokens + length))
            segments.append(range(end, end + length))
            end += length
        groups.append(Group(prefix, tuple(segments)))
    if not groups:
        tokens, position_ids = [torch.tensor([prompt_width - 1])], [torch.tensor([0])]
        groups = [Group(range(1), ())]

    def joined(pieces: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(pieces or [torch.empty(0, dtype=torch.long)]).to(input_ids.device)

    return PackedLayout(
        tokens=joined(tokens),
        position_ids=joined(position_ids),
        scored=joined(scored),
        targets=joined(targets),
        groups=tuple(groups),
        shape=(num_rows, row_width, num_completion_tokens),
    )
