"""The packed row: by hand, and for rows of any shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.shared_prefix.layout import Group, LayoutError, packed_layout


def padded(prompts, completions, extra_left=0, extra_right=0):
    """Prompts padded left with -1, completions padded right with -2; and the mask."""
    prompt_width = max(map(len, prompts)) + extra_left
    width = max(map(len, completions)) + extra_right
    ids = [
        [-1] * (prompt_width - len(p)) + p + c + [-2] * (width - len(c))
        for p, c in zip(prompts, completions, strict=True)
    ]
    ids = torch.tensor(ids).view(len(prompts), prompt_width + width)
    return ids, (ids >= 0).long(), width


def test_by_hand():
    prompts, completions = [[7, 8, 9], [5], [4, 6], [7, 8, 9]], [[1, 2, 3], [7, 0], [8], [4, 5, 6, 0]]
    ids, mask, width = padded(prompts, completions, extra_left=1)
    layout = packed_layout(ids, mask, width)
    assert layout.pack(ids).tolist() == [[7, 8, 4, 9, 1, 2, 9, 4, 5, 6, 6, 5, 7]]
    assert layout.position_ids.tolist() == [0, 1, 0, 2, 3, 4, 2, 3, 4, 5, 1, 0, 1]
    assert layout.labels(ids).tolist() == [1, 2, 3, 4, 5, 6, 0, 8, 7, 0]
    assert layout.scored(torch.arange(13).unsqueeze(0)).tolist() == [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    assert layout.groups == (
        Group(range(0, 2), (range(3, 6), range(6, 10))),
        Group(range(2, 3), (range(10, 11),)),
        Group(range(3, 3), (range(11, 13),)),
    )
    unpacked = layout.unpack(torch.arange(1, 11))
    assert unpacked.tolist() == [[1, 2, 3, 0], [9, 10, 0, 0], [8, 0, 0, 0], [4, 5, 6, 7]]
    # what attention goes by: prefixes and segments, and the segments of the first two groups over their prefixes
    assert layout.pieces.tolist() == [0, 2, 3, 6, 10, 11, 13]
    assert layout.prefix_keys.tolist() == [0, 2, 3]
    assert layout.prefix_queries.tolist() == [0, 7, 8]
    assert (layout.longest_piece, layout.longest_prefix_keys, layout.longest_prefix_queries) == (4, 2, 7)
    assert (layout.prefix_end, layout.shared_end, layout.num_tokens, layout.longest_sequence) == (3, 11, 13, 6)


@pytest.mark.parametrize(
    ("prompts", "completions", "num_tokens", "num_groups"),
    [
        pytest.param([[5]], [[6]], 1, 1, id="one row of one token"),
        pytest.param([[5]], [[6, 7]], 2, 1, id="a prompt of one token has no prefix"),
        pytest.param([[5, 6], [5, 6]], [[1], []], 2, 1, id="an empty completion takes no place"),
        pytest.param([[1, 2], [3, 4], [1, 2]], [[5], [6], [7]], 5, 2, id="a group's rows apart from each other"),
        pytest.param([[1, 2], [2], [1, 2]], [[5], [6], [7]], 4, 2, id="a prompt that ends like another"),
        pytest.param([[1, 2, 3], [1, 2, 4]], [[5], [5]], 6, 2, id="prompts that differ in the last token"),
        pytest.param([[1, 2]] * 4, [[3], [3], [3], [4]], 5, 1, id="two groups with one prompt"),
        pytest.param([[1, 2], [3]], [[], []], 1, 1, id="no row has a completion"),
        pytest.param([[1, 2], [3, 4, 5]], [[], [1]], 3, 1, id="the first row has none"),
    ],
)
def test_odd_shapes(prompts, completions, num_tokens, num_groups):
    ids, mask, width = padded(prompts, completions, extra_right=1)
    layout = packed_layout(ids, mask, width)
    assert (layout.num_tokens, len(layout.groups)) == (num_tokens, num_groups)
    check(layout, ids, prompts, completions)


tokens = st.integers(0, 2)


@given(
    st.lists(
        st.tuples(st.lists(tokens, min_size=1, max_size=4), st.lists(tokens, max_size=5)), min_size=1, max_size=8
    ),
    st.integers(0, 2),
    st.integers(1, 2),
)
def test_any_shape(rows, extra_left, extra_right):
    prompts, completions = [list(row[0]) for row in rows], [list(row[1]) for row in rows]
    ids, mask, width = padded(prompts, completions, extra_left, extra_right)
    check(packed_layout(ids, mask, width), ids, prompts, completions)


def check(layout, ids, prompts, completions):
    packed = layout.pack(ids)[0].tolist()
    positions = layout.position_ids.tolist()
    assert len(packed) == len(positions) == layout.num_tokens
    # prefixes come first; each segment goes on from its own, and they make up the row it comes from
    prefixes = [group.prefix for group in layout.groups]
    segments = [segment for group in layout.groups for segment in group.segments]
    assert [place for run in prefixes + segments for place in run] == list(range(layout.num_tokens))
    assert all(len(segment) > 0 for segment in segments)
    found = []
    for group in layout.groups:
        assert [positions[place] for place in group.prefix] == list(range(len(group.prefix)))
        for segment in group.segments:
            places = [*group.prefix, *segment]
            assert [positions[place] for place in places] == list(range(len(places)))
            found.append([packed[place] for place in places])
    rows = zip(prompts, completions, strict=True)
    assert sorted(found) == sorted([*prompt, *completion[:-1]] for prompt, completion in rows if completion)
    # attention goes by the same: all runs, and those of prefixes and of the segments that see them, each from 0
    runs = [run for run in prefixes + segments if run]
    assert layout.pieces.tolist() == [0, *(run.stop for run in runs)]
    assert layout.longest_piece == max(map(len, runs))
    assert layout.prefix_end == sum(map(len, prefixes))
    shared = [group for group in layout.groups if group.prefix and group.segments]
    assert layout.groups[: len(shared)] == tuple(shared) or not segments
    keys, queries = cumulative(layout.prefix_keys), cumulative(layout.prefix_queries)
    assert keys == ([len(group.prefix) for group in shared] or [0])
    assert queries == ([sum(map(len, group.segments)) for group in shared] or [0])
    assert (layout.longest_prefix_keys, layout.longest_prefix_queries) == (max(keys), max(queries))
    assert layout.shared_end == layout.prefix_end + sum(queries)
    integers = (layout.pieces, layout.prefix_keys, layout.prefix_queries)
    assert all(tensor.dtype == torch.int32 for tensor in integers)
    # all that is scored comes back to where it belongs
    assert layout.unpack(layout.labels(ids) + 1).tolist() == [
        [token + 1 for token in completion] + [0] * (layout.shape[2] - len(completion)) for completion in completions
    ]
    # a prompt is computed once
    distinct = {tuple(prompt) for prompt, completion in zip(prompts, completions, strict=True) if completion}
    total = sum(len(prompt) - 1 for prompt in distinct) + sum(map(len, completions))
    assert layout.num_tokens == max(total, 1)


def cumulative(ends):
    """The lengths that a tensor of ends, from 0, stands for."""
    assert ends[0] == 0
    return ends.diff().tolist()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param([[1, 0, 1, 1]], "^there is padding inside a row", id="a hole in the prompt"),
        pytest.param([[1, 1, 0, 1]], "padding inside a row", id="a completion padded left"),
        pytest.param([[1, 0, 1, 1]], "prompts must be padded left", id="a prompt padded right"),
        pytest.param([[1, 1, 1, 1], [0, 0, 1, 0]], "row 1 has an empty prompt", id="no prompt"),
    ],
)
def test_rows_that_cannot_be_packed(mask, message):
    mask = torch.tensor(mask)
    with pytest.raises(LayoutError, match=message):
        packed_layout(torch.ones_like(mask), mask, 2)


def test_rows_without_a_completion_leave_one_token():
    """The first prompt's last one: there must be something to compute, and it must be no padding."""
    ids, mask, width = padded([[5], [6, 7]], [[], []], extra_right=2)
    layout = packed_layout(ids, mask, width)
    assert layout.pack(ids).tolist() == [[5]]
    assert layout.position_ids.tolist() == [0]
    assert layout.labels(ids).tolist() == layout.targets.tolist() == []
    assert layout.scored(torch.zeros(1, 1)).shape == (1, 0)
    assert layout.longest_sequence == 1
    assert layout.unpack(torch.empty(0)).tolist() == [[0.0, 0.0]] * 2
