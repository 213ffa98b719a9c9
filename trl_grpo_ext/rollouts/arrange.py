"""Which row is computed in which micro-batch: lengths in, numbers of rows out. Knows no tensors.

A *share* is the rows of a micro-batch. Rows by prompt are computed as one packed row, in which a prompt stands once
for all its completions in the share (see [`trl_grpo_ext.shared_prefix.layout`]); others are padded to the longest row
of the share.
"""

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, pairwise

from ..shared_prefix.layout import Row


# Without a number of tokens to go by, a group is dealt out in two parts, and its prompt computed twice, where that
# costs at most this share of its tokens.
_COST_OF_A_SPLIT = 0.1


def packed_tokens(rows: Iterable[Row]) -> int:
    """Tokens that a forward computes of rows in one packed row."""
    rows = [row for row in rows if row.completion_tokens]
    prefixes = {row.prompt: row.prompt_tokens - 1 for row in rows}
    return max(1, sum(prefixes.values()) + sum(row.completion_tokens for row in rows))


def even_shares(order: Sequence[int], num_shares: int) -> list[list[int]]:
    """Rows dealt out in their order, to each share equally many; the first ones get what does not divide."""
    size, rest = divmod(len(order), num_shares)
    ends = accumulate([size + (share < rest) for share in range(num_shares)], initial=0)
    return [list(order[start:end]) for start, end in pairwise(ends)]


# Padded rows


def fewest_padded_shares(
    widths: Sequence[int], order: Iterable[int], num_shares: int, most_tokens: int
) -> list[list[int]] | None:
    """Rows dealt out to as few shares as can be, of which the fullest is as light as it can be then.

    Args:
        widths (`Sequence[int]`):
            Columns that each row needs.
        order (`Iterable[int]`):
            The rows that are dealt out.
        num_shares (`int`), most_tokens (`int`):
            How many shares there are, and the tokens of each: its rows times the columns of the widest. A row that is
            wider gets a share of its own.

    Returns:
        `list[list[int]]` or `None`:
            The rows of each share, the last ones empty; `None` if there are too few shares.
    """
    # Rows of about the same width come together: the widest of those that are left begins a share.
    widest_first = sorted(order, key=lambda row: -widths[row])

    def fill(capacity: int) -> list[list[int]]:
        shares: list[list[int]] = []
        for row in widest_first:
            if not shares or (len(shares[-1]) + 1) * widths[shares[-1][0]] > capacity:
                shares.append([])
            shares[-1].append(row)
        return shares

    shares = fill(most_tokens)
    if len(shares) > num_shares:
        return None
    least, enough = 0, most_tokens
    while least < enough:
        middle = (least + enough) // 2
        if len(fill(middle)) <= len(shares):
            enough = middle
        else:
            least = middle + 1
    shares = fill(enough)
    return shares + [[] for _ in range(num_shares - len(shares))]


# Packed rows


@dataclass(frozen=True)
class _Part:
    """Rows of one prompt, which stay together; none is without a completion."""

    prompt: Hashable
    prefix_tokens: int
    rows: tuple[int, ...]
    completion_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + sum(self.completion_tokens)

    def halves(self) -> list["_Part"]:
        middle = len(self.rows) // 2
        return [
            _Part(self.prompt, self.prefix_tokens, self.rows[half], self.completion_tokens[half])
            for half in (slice(None, middle), slice(middle, None))
        ]


@dataclass
class _Share:
    """Parts that are computed together, and their tokens."""

    tokens: int = 0
    rows: list[int] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    prompts: set[Hashable] = field(default_factory=set)

    def tokens_with(self, part: _Part) -> int:
        return self.tokens + part.tokens - (part.prefix_tokens if part.prompt in self.prompts else 0)

    def add(self, part: _Part) -> None:
        self.tokens = self.tokens_with(part)
        self.rows += part.rows
        self.parts.append(part)
        self.prompts.add(part.prompt)


def shares_by_prompt(
    rows: Sequence[Row], order: Sequence[int], num_shares: int, most_tokens: int
) -> list[list[int]] | None:
    """Rows dealt out so that those of a prompt stay together and shares have about equally many tokens.

    Whole groups go to the lightest share, the heaviest first. They are halved while that is cheap and there are fewer
    than shares, and as long as a share has more than `most_tokens`.

    Args:
        rows (`Sequence[Row]`):
            What is known of rows.
        order (`Sequence[int]`):
            Those that are dealt out.
        num_shares (`int`), most_tokens (`int`):
            How many shares there are, and the tokens of each when it is packed.

    Returns:
        `list[list[int]]` or `None`:
            The rows of each share; `None` if they cannot be kept below `most_tokens`.
    """
    pieces, without_tokens = _groups(rows, order)

    def halve_heaviest(where: Callable[[_Part], bool]) -> bool:
        """Halve the heaviest part that has two rows and meets a condition; whether there was one."""
        divisible = [part for part in pieces if len(part.rows) > 1 and where(part)]
        if not divisible:
            return False
        heaviest = max(divisible, key=lambda part: part.tokens)
        pieces.remove(heaviest)
        pieces.extend(heaviest.halves())
        return True

    def is_cheap(part: _Part) -> bool:
        return part.prefix_tokens <= _COST_OF_A_SPLIT * part.tokens

    while len(pieces) < num_shares and halve_heaviest(is_cheap):
        pass
    while True:
        shares = _to_the_lightest(pieces, num_shares)
        if max(share.tokens for share in shares) <= most_tokens:
            return _rows_of(shares, without_tokens)
        if not halve_heaviest(lambda part: True):
            return None


def fewest_shares_by_prompt(
    rows: Sequence[Row], order: Sequence[int], num_shares: int, most_tokens: int
) -> list[list[int]] | None:
    """Rows dealt out to few shares, so that those of a prompt stay together where that costs no share.

    Bin packing, whole groups first and the largest first; a group is halved where it finds no room otherwise. Then the
    same parts are put into as many shares so that the fullest is light.

    Args:
        rows (`Sequence[Row]`), order (`Sequence[int]`), num_shares (`int`):
            As of [`shares_by_prompt`].
        most_tokens (`int`):
            Tokens of a share when it is packed. A row that has more gets a share of its own.

    Returns:
        `list[list[int]]` or `None`:
            The rows of each share, the last ones empty; `None` if no way was found to do with so many shares.
    """
    is_too_long = {row: packed_tokens([rows[row]]) > most_tokens for row in order}
    alone = [row for row in order if is_too_long[row]]
    groups, without_tokens = _groups(rows, [row for row in order if not is_too_long[row]])
    shares = _fewest(groups, num_shares - len(alone), most_tokens)
    if shares is None:
        return None
    dealt = [[row] for row in alone] + _rows_of(shares, [])
    dealt += [[] for _ in range(num_shares - len(dealt))]
    dealt[0] += without_tokens
    return dealt


def _fewest(groups: Sequence[_Part], num_shares: int, most_tokens: int) -> list[_Share] | None:
    if not groups:
        return [] if num_shares >= 0 else None
    fewest = max(1, -(-_tokens_of_one_share(groups) // most_tokens))
    for number in range(fewest, num_shares + 1):
        whole = _to_the_lightest(groups, number)
        fits = max(share.tokens for share in whole) <= most_tokens
        shares = whole if fits else _fill(groups, number, most_tokens) or _fill(groups, number, most_tokens, True)
        if shares is not None:
            return _balanced(shares)
    return None


def _balanced(shares: list[_Share]) -> list[_Share]:
    """The same parts in as many shares, of which the fullest is as light as was found by a few tries."""
    parts = [part for share in shares for part in share.parts]
    for tried in (_to_the_lightest(parts, len(shares)), *_tighter(parts, shares)):
        if _fullest(tried) < _fullest(shares):
            shares = tried
    return shares


def _tighter(parts: Sequence[_Part], shares: Sequence[_Share]) -> Iterable[list[_Share]]:
    """Ways to fill shares up to less than the fullest has, by bisection: the MULTIFIT algorithm of scheduling."""
    least, enough = -(-_tokens_of_one_share(parts) // len(shares)), _fullest(shares)
    while least < enough:
        middle = (least + enough) // 2
        filled = _fill(parts, len(shares), middle)
        if filled is None:
            least = middle + 1
        else:
            enough = middle
            yield filled


def _fullest(shares: Sequence[_Share]) -> int:
    return max(share.tokens for share in shares)


def _tokens_of_one_share(parts: Iterable[_Part]) -> int:
    """Tokens of all parts together, each prompt once."""
    share = _Share()
    for part in parts:
        share.add(part)
    return share.tokens


def _fill(parts: Sequence[_Part], num_shares: int, most_tokens: int, may_halve: bool = False) -> list[_Share] | None:
    """Parts in shares, the largest first, each where it adds the least, and then where the least room is left."""
    shares = [_Share() for _ in range(num_shares)]
    number = count()  # of parts as large, the first comes first
    queue = [(-part.tokens, next(number), part) for part in parts]
    heapq.heapify(queue)
    while queue:
        *_, part = heapq.heappop(queue)
        open_shares = [share for share in shares if share.tokens_with(part) <= most_tokens]
        if open_shares:
            min(open_shares, key=lambda share: (share.tokens_with(part) - share.tokens, -share.tokens)).add(part)
        elif may_halve and len(part.rows) > 1:
            for half in part.halves():
                heapq.heappush(queue, (-half.tokens, next(number), half))
        else:
            return None
    return shares


def _to_the_lightest(parts: Iterable[_Part], num_shares: int) -> list[_Share]:
    """Parts in shares, the largest first, each where it leaves the lightest share."""
    shares = [_Share() for _ in range(num_shares)]
    for part in sorted(parts, key=lambda part: -part.tokens):
        min(shares, key=lambda share: share.tokens_with(part)).add(part)
    return shares


def _groups(rows: Sequence[Row], order: Iterable[int]) -> tuple[list[_Part], list[int]]:
    """The rows of each prompt, and those that have no token to compute."""
    groups: dict[Hashable, list[int]] = {}
    without_tokens = []
    for row in order:
        if rows[row].completion_tokens:
            groups.setdefault(rows[row].prompt, []).append(row)
        else:
            without_tokens.append(row)
    return [
        _Part(
            prompt,
            rows[members[0]].prompt_tokens - 1,
            tuple(members),
            tuple(rows[row].completion_tokens for row in members),
        )
        for prompt, members in groups.items()
    ], without_tokens


def _rows_of(shares: Sequence[_Share], without_tokens: Sequence[int]) -> list[list[int]]:
    """Rows of shares; those without a token, which cost nothing, are in the first one."""
    dealt = [share.rows for share in shares]
    if without_tokens:
        dealt[0] = dealt[0] + list(without_tokens)
    return dealt
