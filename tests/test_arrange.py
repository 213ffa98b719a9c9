"""Rows dealt out to micro-batches: by hand, and against the best of all ways for a few rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rollouts.arrange import (
    even_shares,
    fewest_padded_shares,
    fewest_shares_by_prompt,
    packed_tokens,
    shares_by_prompt,
)
from trl_grpo_ext.shared_prefix.layout import Row, lay_out


PROMPT_TOKENS = {"a": 1, "b": 4, "c": 10}
ROWS = st.lists(
    st.builds(
        lambda prompt, tokens: Row(prompt, PROMPT_TOKENS[prompt], tokens),
        st.sampled_from(sorted(PROMPT_TOKENS)),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


def rows_of(*groups):
    """Rows of groups (prompt's tokens, completions' tokens ...)."""
    return [Row(number, tokens, length) for number, (tokens, *lengths) in enumerate(groups) for length in lengths]


def tokens_by_hand(rows):
    prompts = {row.prompt: row.prompt_tokens for row in rows if row.completion_tokens}
    return sum(tokens - 1 for tokens in prompts.values()) + sum(row.completion_tokens for row in rows)


def ways_to_share(items):
    """All ways to put items into shares."""
    if not items:
        yield []
        return
    first, *others = items
    for way in ways_to_share(others):
        yield [[first], *way]
        for place, share in enumerate(way):
            yield [*way[:place], [first, *share], *way[place + 1 :]]


def fewest_by_trying(numbers, cost, most):
    """How many shares are needed, and the cost of the fullest of so many at its least.

    An item that costs more than a share may have needs one of its own.
    """
    ways = [
        (len(way), max(map(cost, way)))
        for way in ways_to_share(numbers)
        if all(len(share) == 1 or cost(share) <= most for share in way)
    ]
    return min(ways)


@given(ROWS)
def test_tokens_of_a_packed_row(rows):
    longest = max(row.completion_tokens for row in rows)
    assert packed_tokens(rows) == lay_out(rows, 10, max(1, longest)).num_tokens
    assert packed_tokens(rows) == max(1, tokens_by_hand(rows))


@given(ROWS, st.integers(1, 40), st.integers(1, 6))
def test_few_shares_by_prompt(rows, most, number):
    order = list(range(len(rows)))
    shares = fewest_shares_by_prompt(rows, order, number, most)
    fewest, _ = fewest_by_trying(
        [row for row in order if rows[row].completion_tokens] or order[:1],
        lambda share: tokens_by_hand([rows[row] for row in share]),
        most,
    )
    if shares is None:
        assert fewest + 1 > number
        return
    assert len(shares) == number
    assert sorted(row for share in shares for row in share) == order
    used = [share for share in shares if share]
    assert fewest <= len(used) <= fewest + 1
    assert shares[: len(used)] == used
    for share in used:
        computed = [row for row in share if rows[row].completion_tokens]
        assert len(computed) <= 1 or tokens_by_hand([rows[row] for row in share]) <= most


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 6))
def test_few_padded_shares(widths, most, number):
    order = list(range(len(widths)))

    def cost(share):
        return len(share) * max(widths[row] for row in share)

    fewest, lightest = fewest_by_trying(order, cost, most)
    shares = fewest_padded_shares(widths, order, number, most)
    if fewest > number:
        assert shares is None
        return
    assert len(shares) == number
    assert sorted(row for share in shares for row in share) == order
    used = [share for share in shares if share]
    assert len(used) == fewest
    assert max(map(cost, used)) == lightest


@pytest.mark.parametrize(
    ("rows", "number", "most", "expected"),
    [
        pytest.param(rows_of((5, 4, 4), (5, 3, 3)), 2, 22, [[0, 1, 2, 3], []], id="one is enough"),
        pytest.param(rows_of((5, 4, 4), (5, 3, 3)), 2, 21, [[0, 1], [2, 3]], id="whole groups"),
        pytest.param(  # 12, 9, 8, 7 and 4 tokens: 20 and 20, not 24 and 16
            rows_of((1, 12), (1, 9), (1, 8), (1, 7), (1, 4)), 4, 24, [[0, 2], [1, 3, 4], [], []], id="balanced"
        ),
        pytest.param(  # 3 x 14 tokens: two shares of whole groups have 28 and 14, with a group halved 23 and 22
            rows_of((4, 5, 6), (4, 5, 6), (4, 5, 6)), 3, 26, [[0, 1, 5], [2, 3, 4], []], id="halved to save one"
        ),
        pytest.param(
            rows_of((4, 5, 6), (4, 5, 6), (4, 5, 6)), 3, 22, [[0, 1], [2, 3], [4, 5]], id="not halved in vain"
        ),
        pytest.param(rows_of((3, 4, 4, 4, 4)), 2, 12, [[0, 1], [2, 3]], id="halved for the number"),
        pytest.param(rows_of((3, 4, 4, 4, 4)), 2, 9, None, id="too few"),
        pytest.param(rows_of((3, 20, 4), (3, 5)), 3, 15, [[0], [1, 2], []], id="too long, and by itself"),
        pytest.param(rows_of((3, 20, 4), (3, 5)), 1, 15, None, id="too long, and no room"),
        pytest.param(rows_of((3, 0, 4, 0)), 2, 6, [[1, 0, 2], []], id="a row without a token takes no room"),
        pytest.param(rows_of((3, 0, 0)), 2, 6, [[0, 1], []], id="no row has a token"),
        pytest.param([], 2, 6, [[], []], id="no row"),
    ],
)
def test_few_shares_by_hand(rows, number, most, expected):
    found = fewest_shares_by_prompt(rows, range(len(rows)), number, most)
    if expected is None:
        assert found is None
    else:
        assert sorted(sorted(share) for share in found) == sorted(sorted(share) for share in expected)


def test_many_rows_are_dealt_out_at_once():
    """64 groups of 8: as few as their tokens ask for, or one more, and about equally full."""
    rows = rows_of(*((20 + 3 * (group % 7), *(5 + (group * row) % 31 for row in range(8))) for group in range(64)))
    shares = fewest_shares_by_prompt(rows, range(len(rows)), 64, 900)
    used = [packed_tokens([rows[row] for row in share]) for share in shares if share]
    at_best = -(-packed_tokens(rows) // 900)
    assert at_best <= len(used) <= at_best + 1
    assert max(used) <= 1.02 * sum(used) / len(used)


def test_shares_by_prompt_that_cannot_be_had():
    assert shares_by_prompt(rows_of((5, 9), (5, 9)), [0, 1], 1, 25) is None
    assert shares_by_prompt(rows_of((5, 9), (5, 9)), [0, 1], 1, 26) == [[0, 1]]


@pytest.mark.parametrize(
    ("order", "number", "expected"),
    [([3, 1, 2], 2, [[3, 1], [2]]), ([], 2, [[], []]), ([5], 3, [[5], [], []]), ([0, 1, 2, 3], 2, [[0, 1], [2, 3]])],
)
def test_even_shares(order, number, expected):
    assert even_shares(order, number) == expected
