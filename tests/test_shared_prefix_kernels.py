"""Kernels of packed attention against attention over padded rows, and what is chosen where there is no kernel."""

from dataclasses import fields

import pytest
import torch

from trl_grpo_ext.shared_prefix import attention, kernels
from trl_grpo_ext.shared_prefix.attention import Segments
from trl_grpo_ext.shared_prefix.layout import Row, lay_out, on_device


# Rows by prompt, tokens of the prompt and of the completion
SHAPES = {
    "unequal groups": [(0, 5, 7), (1, 1, 3), (0, 5, 1), (2, 90, 70), (1, 1, 1), (2, 90, 66), (0, 5, 12), (3, 17, 1)],
    "one group": [(0, 33, 9), (0, 33, 130), (0, 33, 1)],
    "one completion": [(0, 3, 4)],
    "one token": [(0, 1, 1)],
    "only prompts of one token": [(0, 1, 4), (0, 1, 2), (1, 1, 3)],
    "only segments of one token": [(0, 4, 1), (0, 4, 1), (1, 1, 1)],
    "no completion has a token": [(0, 3, 0), (1, 2, 0)],
    "many short segments": [(row % 2, 20 + row % 2, 1 + row % 5) for row in range(24)],
}
# heads, key heads, size
HEADS = [(4, 2, 8), (3, 3, 16), pytest.param((8, 1, 64), marks=pytest.mark.slow), (14, 2, 64)]


def layout_of(shape):
    rows = SHAPES[shape]
    return lay_out([Row(*row) for row in rows], max(row[1] for row in rows) + 1, max(row[2] for row in rows) + 1)


def states_of(layout, heads, key_heads, size, dtype=torch.float64):
    """Queries, keys, values and the output's gradient, as transformers has them: `(1, heads, N, size)`."""
    numbers = torch.Generator().manual_seed(0)
    shapes = [(1, count, layout.num_tokens, size) for count in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in shapes]


def padded(query, key, value, layout):
    """The oracle: each prefix, and each prefix with a segment, is a row of a padded batch."""
    pieces = [(group.prefix, range(0)) for group in layout.groups if group.prefix]
    pieces += [(group.prefix, segment) for group in layout.groups for segment in group.segments]
    rows = [[*prefix, *segment] for prefix, segment in pieces]
    longest = max(map(len, rows))
    places = torch.tensor([[-1] * (longest - len(row)) + row for row in rows])
    is_token = places >= 0
    mask = is_token.unsqueeze(1) & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = (mask | torch.eye(longest, dtype=torch.bool)).unsqueeze(1)  # a place of padding sees itself
    repeats = query.size(1) // key.size(1)
    by_row = [
        states[0][:, places.clamp(min=0)].transpose(0, 1)
        for states in (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
    ]
    output = torch.nn.functional.scaled_dot_product_attention(*by_row, attn_mask=mask)
    found = torch.zeros_like(query[0])
    for row, (prefix, segment) in enumerate(pieces):
        own = segment or prefix
        found = found.index_copy(1, torch.tensor([*own]), output[row, :, longest - len(own) :])
    return found.transpose(0, 1).unsqueeze(0)


def output_and_gradients(attend, states):
    *inputs, gradient = states
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output = attend(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient.transpose(1, 2))]


def worst(found, expected):
    """The largest relative difference; relative to a tenth of the largest norm where one is near 0."""
    norms = [tensor.double().norm().item() for tensor in expected]
    return max(
        (a.double() - b.double()).norm().item() / max(norm, max(norms) / 10)
        for a, b, norm in zip(found, expected, norms, strict=True)
    )


@pytest.fixture
def use(monkeypatch):
    """Let packed attention be computed by a kernel."""
    return lambda kernel: monkeypatch.setitem(kernels.KERNELS, "cpu", kernel)


def packed(layout):
    return lambda *states: attention.shared_prefix_attention(None, *states, None, segments=Segments(layout))[0]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kernel", [kernels.ReferenceKernel(), kernels.CpuKernel()], ids=["reference", "cpu"])
def test_equals_padded_attention(kernel, dtype, tolerance, shape, heads, use):
    use(kernel)
    layout = layout_of(shape)
    states = states_of(layout, *heads, dtype)
    expected = output_and_gradients(lambda *inputs: padded(*inputs, layout), states)
    assert worst(output_and_gradients(packed(layout), states), expected) <= tolerance


@pytest.mark.parametrize("shape", ["unequal groups", "one group", "many short segments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_no_more_than_padded_attention(dtype, shape):
    """Against fp64, with the same rounded states: at most twice its error."""
    layout = layout_of(shape)
    states = states_of(layout, 8, 2, 64, dtype)
    exact = output_and_gradients(lambda *inputs: padded(*inputs, layout), [state.double() for state in states])
    of_padded = worst(output_and_gradients(lambda *inputs: padded(*inputs, layout), states), exact)
    assert 0 < worst(output_and_gradients(packed(layout), states), exact) <= 2 * of_padded


def test_scale_and_strides():
    """States that are views, as where one projection makes all three."""
    layout = layout_of("unequal groups")
    states = states_of(layout, 4, 4, 8)
    together = torch.cat(states[:3], dim=-1)
    views = [*together.split(8, dim=-1), states[3]]
    expected = output_and_gradients(lambda query, *others: padded(query * 0.5, *others, layout), states)
    found = output_and_gradients(
        lambda *inputs: attention.shared_prefix_attention(
            None, *inputs, None, scaling=0.5 * 8**-0.5, segments=Segments(layout)
        )[0],
        views,
    )
    assert worst(found, expected) <= 1e-12


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=[pytest.mark.slow] if n % 3 else []) for n, shape in enumerate(SHAPES)]
)
def test_operator(shape):
    """What torch demands of an operator: its schema, the shapes it promises, its gradient, also compiled."""
    layout = layout_of(shape)
    query, key, value, _ = (state[0].transpose(0, 1).requires_grad_() for state in states_of(layout, 4, 2, 8))
    arguments = (query, key, value, *kernels.Calls.of(layout), 0.3)
    torch.library.opcheck(torch.ops.trl_grpo_ext.packed_attention.default, arguments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", HEADS)
def test_flash_kernel_calls_torch_as_it_wants_to_be_called(shape, heads):
    """On torch's device without storage, where its operators look at what they are given and compute nothing."""
    (layout,) = on_device([layout_of(shape)], torch.device("meta"))
    states = states_of(layout, *heads, torch.bfloat16)
    query, key, value, gradient = (state.to("meta")[0].transpose(0, 1) for state in states)
    calls, scale = kernels.Calls.of(layout), 0.125
    output, log_sum_exp = kernels.merged_forward(kernels.FlashKernel(), query, key, value, calls, scale)
    assert (output.shape, output.dtype) == (query.shape, torch.bfloat16)
    assert (log_sum_exp.shape, log_sum_exp.dtype) == ((query.size(1), query.size(0)), torch.float32)
    found = kernels.merged_backward(
        kernels.FlashKernel(), gradient, query, key, value, output, log_sum_exp, calls, scale
    )
    for tensor, state in zip(found, (query, key, value), strict=True):
        assert (tensor.shape, tensor.dtype) == (state.shape, state.dtype)


def test_layouts_cross_to_a_device_in_one_copy(monkeypatch):
    layouts = [layout_of(shape) for shape in SHAPES]
    copies = []
    original = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if args and isinstance(args[0], torch.device):
            copies.append((args[0], kwargs))
            return original(tensor, "cpu")  # so that there is something to read
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    found = on_device(layouts, torch.device("meta"))
    assert copies == [(torch.device("meta"), {"non_blocking": True})]
    for there, here in zip(found, layouts, strict=True):
        for item in fields(here):
            expected, value = getattr(here, item.name), getattr(there, item.name)
            if isinstance(expected, torch.Tensor):
                assert value.dtype == expected.dtype
                assert torch.equal(value, expected)
            else:
                assert value == expected
    assert on_device(layouts, torch.device("cpu")) == layouts


# Where there is no kernel


def test_states_that_no_kernel_takes():
    """They go by segment: on a GPU full precision and odd heads, everywhere values of another size, and dropout."""
    cuda = torch.device("cuda")
    assert "half precision" in kernels.why_not(cuda, torch.float32, 64, 1)
    assert "steps of 8" in kernels.why_not(cuda, torch.bfloat16, 60, 1)
    assert "up to 256" in kernels.why_not(cuda, torch.bfloat16, 264, 1)
    assert kernels.why_not(torch.device("cpu"), torch.float32, 60, 1) is None
    layout = layout_of("unequal groups")
    query, key, value, gradient = states_of(layout, 4, 2, 8)
    value, gradient = torch.cat([value, value], dim=-1), torch.cat([gradient, gradient], dim=-1)
    assert not kernels.takes(*(state[0].transpose(0, 1) for state in (query, key, value)))
    found = output_and_gradients(packed(layout), [query, key, value, gradient])
    narrow = output_and_gradients(packed(layout), states_of(layout, 4, 2, 8))
    assert (
        torch.equal(found[0], torch.cat([narrow[0]] * 2, dim=-1))
        or worst([found[0]], [torch.cat([narrow[0]] * 2, dim=-1)]) < 1e-12
    )
    wide = attention.shared_prefix_attention(None, query, key, value, None, dropout=0.5, segments=Segments(layout))[0]
    assert worst([wide], [found[0]]) > 0.1


class Spoilt(kernels.CpuKernel):
    def __init__(self, spoil):
        self.spoil = spoil

    def forward(self, *arguments):
        return self.spoil(*super().forward(*arguments))


class SpoiltBackward(kernels.CpuKernel):
    """As one whose autograd forgets that outputs are merged."""

    def backward(self, gradient, query, key, value, output, log_sum_exp, spans, scale):
        own, own_log_sum_exp = self.forward(query, key, value, spans, scale)
        return super().backward(gradient, query, key, value, own, own_log_sum_exp, spans, scale)


def fail(*results):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nsecond line")


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (kernels.CpuKernel(), None),
        (Spoilt(fail), "it fails (RuntimeError: FlashAttention only supports Ampere GPUs or newer. second line)"),
        (Spoilt(lambda output, lse: (output, lse.unsqueeze(0))), "log-sum-exps are of shape (1, 6, 21)"),
        (Spoilt(lambda output, lse: (output, lse + 0.3)), "not those of plain torch"),
        (Spoilt(lambda output, lse: (output.roll(1, dims=1), lse)), "not those of plain torch"),
        (Spoilt(lambda output, lse: (output * torch.nan, lse)), "not those of plain torch"),
        (SpoiltBackward(), "not those of plain torch"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_is_tried_before_it_is_used(kernel, fault, dtype):
    found = kernels._trial(kernel, torch.device("cpu"), dtype, 64, 3)
    assert found is None if fault is None else fault in found


def test_a_kernel_is_tried_once(monkeypatch, caplog):
    tried = []
    monkeypatch.setattr(kernels, "_OBSTACLES", {})
    monkeypatch.setattr(kernels, "_trial", lambda *arguments: tried.append(arguments))
    states = torch.device("cuda", 0), torch.bfloat16, 64, 2
    assert kernels.why_not(*states) is None
    assert kernels.why_not(*states) is None
    assert len(tried) == 1
