"""The kernel of packed attention on a GPU against attention over padded rows, each against fp64."""

import pytest
import torch
from on_gpu import DEVICE, HALF, ON_GPU, has_flash_attention

from trl_grpo_ext.shared_prefix import kernels
from trl_grpo_ext.shared_prefix.layout import Row, lay_out, on_device


pytestmark = ON_GPU

# Rows by prompt, tokens of the prompt and of the completion
SHAPES = {
    "unequal groups": [(0, 70, 133), (1, 5, 80), (0, 70, 1), (1, 5, 64), (2, 1, 9), (1, 5, 17), (3, 129, 1)],
    "a long prompt": [(0, 900, 65), (0, 900, 300), (0, 900, 128), (0, 900, 7)],
    "only prompts of one token": [(0, 1, 40), (0, 1, 2), (1, 1, 300)],
    "one query for each prefix": [(0, 9, 1), (1, 140, 1), (2, 33, 1)],
    "pieces of one token": [(0, 2, 1), (1, 2, 1)],
    "many short segments": [(row % 3, 20 + row % 3, 1 + row % 5) for row in range(48)],
}
HEADS = {"grouped": (8, 2), "one key head": (6, 1), "a key head for each": (4, 4)}


def layout_of(shape):
    rows = SHAPES[shape]
    prompt_width, width = max(row[1] for row in rows), max(row[2] for row in rows)
    return on_device([lay_out([Row(*row) for row in rows], prompt_width, width)], DEVICE)[0]


def states_of(num_tokens, heads, key_heads, size, dtype):
    """Queries, keys, values and the output's gradient, `(N, heads, size)`."""
    numbers = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, count, size) for count in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape, generator=numbers).to(DEVICE, dtype) for shape in shapes]


def rows_of(groups):
    """Places in the packed row of each padded row, and how many of its first ones are counted with another row."""
    rows = []
    for group in groups:
        for number, segment in enumerate(group.segments):
            rows.append(([*group.prefix, *segment], len(group.prefix) if number else 0))
    return rows


def padded(query, key, value, gradient, groups, dtype):
    """Output and gradients of attention over rows that are padded to the longest, brought together in fp64."""
    rows = rows_of(groups)
    longest = max(len(places) for places, _ in rows)
    places = torch.tensor([places + [0] * (longest - len(places)) for places, _ in rows], device=DEVICE)
    columns = torch.arange(longest, device=DEVICE)
    lengths = torch.tensor([len(places) for places, _ in rows], device=DEVICE).unsqueeze(1)
    counted_before = torch.tensor([first for _, first in rows], device=DEVICE).unsqueeze(1)
    is_token = columns < lengths
    counts = is_token & (columns >= counted_before)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=DEVICE).tril()
    mask = (is_token.unsqueeze(1) & causal).unsqueeze(1)

    repeats = query.size(1) // key.size(1)
    inputs = [state[places].transpose(1, 2).to(dtype).requires_grad_() for state in (query, key, value)]
    output = torch.nn.functional.scaled_dot_product_attention(
        inputs[0],
        *(state.repeat_interleave(repeats, 1) for state in inputs[1:]),
        attn_mask=mask,
    )
    of_output = (gradient[places] * counts[..., None, None]).transpose(1, 2).to(dtype)
    parts = [output.detach(), *torch.autograd.grad(output, inputs, of_output)]

    def together(part, of_interest):
        whole = torch.zeros(query.size(0), part.size(1), part.size(3), dtype=torch.float64, device=DEVICE)
        return whole.index_add(0, places[of_interest], part.transpose(1, 2)[of_interest].double())

    return [together(parts[0], counts), *(together(part, is_token) for part in parts[1:])]


def packed(query, key, value, gradient, layout):
    inputs = [state.clone().requires_grad_() for state in (query, key, value)]
    output = kernels.packed_attention(*inputs, layout)
    return [part.double() for part in (output.detach(), *torch.autograd.grad(output, inputs, gradient))]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", HALF)
def test_rounds_no_more_than_padded_attention(dtype, size, shape, heads):
    """Output and gradients: at most twice the error of padded attention."""
    if not has_flash_attention():
        pytest.skip("torch has FlashAttention for cards from compute capability 8.0 on")
    dtype, (num_heads, key_heads) = HALF[dtype], HEADS[heads]
    assert kernels.why_not(DEVICE, dtype, size, num_heads // key_heads) is None
    layout = layout_of(shape)
    states = states_of(layout.num_tokens, num_heads, key_heads, size, dtype)
    exact = padded(*(state.double() for state in states), layout.groups, torch.float64)
    found, of_padded = packed(*states, layout), padded(*states, layout.groups, dtype)
    # where a query sees a single key, its gradient is 0 but for what cancels
    slack = 0.1 * torch.finfo(dtype).eps * max(part.norm().item() for part in exact)
    for name, one, other, expected in zip(("output", "query", "key", "value"), found, of_padded, exact, strict=True):
        error, bound = (one - expected).norm().item(), 2 * (other - expected).norm().item()
        assert error <= bound + slack, (name, error, bound)


@pytest.mark.parametrize("dtype", HALF)
def test_states_that_are_views(dtype):
    """As where one projection makes queries, keys and values."""
    if not has_flash_attention():
        pytest.skip("torch has FlashAttention for cards from compute capability 8.0 on")
    layout = layout_of("unequal groups")
    *states, gradient = states_of(layout.num_tokens, 4, 4, 64, HALF[dtype])
    views = torch.cat(states, dim=-1).split(64, dim=-1)
    expected = packed(*states, gradient, layout)
    inputs = [view.detach().requires_grad_() for view in views]
    output = kernels.packed_attention(*inputs, layout)
    assert not inputs[0].is_contiguous()
    for one, other in zip((output, *torch.autograd.grad(output, inputs, gradient)), expected, strict=True):
        assert (one.double() - other).norm() <= 1e-3 * other.norm()


def test_an_exact_state_is_not_for_the_kernel():
    """In full precision rows are computed segment by segment, and so they are on every card."""
    assert kernels.why_not(DEVICE, torch.float32, 64, 2) is not None
