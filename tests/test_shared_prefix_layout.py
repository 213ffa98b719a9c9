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
    ids, mask, width = padded([[7, 8, 9], [7, 8, 9]], [[1, 2, 3], [4, 5, 6, 0]], extra_left=1)
    layout = packed_layout(ids, mask, width)
    assert layout.pack(ids).tolist() == [[7, 8, 9, 1, 2, 9, 4, 5, 6]]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert layout.scored.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert layout.labels(ids).tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert layout.groups == (Group(range(0, 2), (range(2, 5), range(5, 9))),)
    assert layout.unpack(torch.tensor([1, 2, 3, 4, 5, 6, 7])).tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert layout.num_tokens == 9
    assert layout.longest_sequence == 6


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
    # each segment goes on from its prefix, and they make up the row it comes from
    found, end = [], 0
    for group in layout.groups:
        assert group.prefix.start == end
        end = group.prefix.stop
        assert positions[group.prefix.start : group.prefix.stop] == list(range(len(group.prefix)))
        for segment in group.segments:
            assert segment.start == end
            assert len(segment) > 0
            end = segment.stop
            places = [*group.prefix, *segment]
            assert [positions[place] for place in places] == list(range(len(places)))
            found.append([packed[place] for place in places])
    assert end == layout.num_tokens
    rows = zip(prompts, completions, strict=True)
    assert sorted(found) == sorted([*prompt, *completion[:-1]] for prompt, completion in rows if completion)
    # all that is scored comes back to where it belongs
    assert layout.unpack(layout.labels(ids) + 1).tolist() == [
        [token + 1 for token in completion] + [0] * (layout.shape[2] - len(completion)) for completion in completions
    ]
    # a prompt is computed once
    distinct = {tuple(prompt) for prompt, completion in zip(prompts, completions, strict=True) if completion}
    total = sum(len(prompt) - 1 for prompt in distinct) + sum(map(len, completions))
    assert layout.num_tokens == max(total, 1)


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
    assert layout.scored.tolist() == layout.targets.tolist() == []
    assert layout.longest_sequence == 1
    assert layout.unpack(torch.empty(0)).tolist() == [[0.0, 0.0]] * 2
