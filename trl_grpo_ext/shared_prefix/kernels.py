"""Attention over a packed row in two calls of a kernel that takes sequences of any length, put together.

The first call computes every prefix and every segment by itself, causally; the second, the segments of each group over
their prefix. A query's output is the mean of what the two have found, weighed by their log-sum-exps: that is how
FlashAttention (https://huggingface.co/papers/2205.14135) puts its blocks together, and the decomposition of Hydragen
(https://huggingface.co/papers/2402.05099), here with its gradient. A kernel's backward takes the output and the
log-sum-exp of a query over *all* that it saw: from these it computes the weights again, and so gives the gradient of
each part of what the query saw.

Devices differ by the [`Kernel`] alone. To `torch.compile` all of it is one operator, `trl_grpo_ext::packed_attention`,
so that neither the number of sequences nor their lengths are in a graph; to autograd, one function.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from .. import compat
from ..exits import one_line
from .layout import PackedLayout, Row, lay_out, on_device


logger = logging.getLogger(__name__)


class Spans(NamedTuple):
    """Sequences one after the other: the first queries see the first keys, and so on.

    Args:
        queries (`torch.Tensor`), keys (`torch.Tensor`):
            Cumulative lengths from 0, int32, of the same length.
        longest_queries (`int`), longest_keys (`int`):
            The longest, in tokens.
        is_causal (`bool`):
            Whether a query sees no key behind its own place; sequences then have as many keys as queries.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int
    is_causal: bool

    def each(self) -> Iterator[tuple[slice, slice]]:
        """Queries and keys of each sequence; on a GPU this waits for the lengths."""
        ends = zip(self.queries.tolist(), self.keys.tolist(), strict=True)
        for (query, key), (query_end, key_end) in pairwise(ends):
            yield slice(query, query_end), slice(key, key_end)


class Calls(NamedTuple):
    """The two calls of a packed row, one tensor or number after the other, because an operator takes nothing else.

    Args are those of [`PackedLayout`] that have these names.
    """

    pieces: torch.Tensor
    prefix_queries: torch.Tensor
    prefix_keys: torch.Tensor
    longest_piece: int
    longest_prefix_queries: int
    longest_prefix_keys: int
    prefix_end: int
    shared_end: int

    @classmethod
    def of(cls, layout: PackedLayout) -> "Calls":
        return cls(
            layout.pieces,
            layout.prefix_queries,
            layout.prefix_keys,
            layout.longest_piece,
            layout.longest_prefix_queries,
            layout.longest_prefix_keys,
            layout.prefix_end,
            layout.shared_end,
        )

    @property
    def own(self) -> Spans:
        """Prefixes and segments, each by itself."""
        return Spans(self.pieces, self.pieces, self.longest_piece, self.longest_piece, True)

    @property
    def over_prefix(self) -> Spans:
        """The segments of each group, from `prefix_end` to `shared_end`, over their prefix."""
        longest = self.longest_prefix_queries, self.longest_prefix_keys
        return Spans(self.prefix_queries, self.prefix_keys, *longest, False)


class Kernel(Protocol):
    """Attention of many sequences in one call.

    Queries are `(tokens, heads, size)`, keys and values `(tokens, key heads, size)`, of as many heads or a divisor of
    it; outputs are as queries, log-sum-exps `(heads, tokens)` of at least fp32.
    """

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of each query over the keys of its sequence."""
        ...

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of queries, keys and values, where output and log-sum-exp may be over other keys besides."""
        ...


class ReferenceKernel:
    """Plain torch, in at least fp32: what other kernels are held against."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        output = torch.zeros_like(query)
        log_sum_exp = query.new_full((query.size(1), query.size(0)), -torch.inf, dtype=wide)
        for rows, seen in spans.each():
            scores = self._scores(query[rows].to(wide), key[seen].to(wide), spans.is_causal, scale)
            values = _for_each_head(value[seen].to(wide), query)
            log_sum_exp[:, rows] = scores.logsumexp(-1)
            output[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values).to(query.dtype)
        return output, log_sum_exp

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient, wide_query, wide_key, wide_value, output = (
            states.to(log_sum_exp.dtype) for states in (gradient, query, key, value, output)
        )
        of_query, of_key, of_value = (torch.zeros_like(states) for states in (query, key, value))
        delta = (gradient * output).sum(-1).t()  # (heads, tokens)
        for rows, seen in spans.each():
            scores = self._scores(wide_query[rows], wide_key[seen], spans.is_causal, scale)
            weights = (scores - log_sum_exp[:, rows].unsqueeze(-1)).exp()
            values = _for_each_head(wide_value[seen], query)
            of_weights = torch.einsum("nhd,mhd->hnm", gradient[rows], values)
            of_scores = weights * (of_weights - delta[:, rows].unsqueeze(-1)) * scale
            keys = _for_each_head(wide_key[seen], query)
            of_query[rows] = torch.einsum("hnm,mhd->nhd", of_scores, keys).to(query.dtype)
            of_key[seen] = _of_key_heads(torch.einsum("hnm,nhd->mhd", of_scores, wide_query[rows]), key)
            of_value[seen] = _of_key_heads(torch.einsum("hnm,nhd->mhd", weights, gradient[rows]), value)
        return of_query, of_key, of_value

    @staticmethod
    def _scores(query: torch.Tensor, key: torch.Tensor, is_causal: bool, scale: float) -> torch.Tensor:
        scores = torch.einsum("nhd,mhd->hnm", query, _for_each_head(key, query)) * scale
        if is_causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores


def _for_each_head(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return states.repeat_interleave(query.size(1) // states.size(1), dim=1)


def _of_key_heads(gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """The gradient of `states`, whose heads several heads of a gradient share."""
    return gradient.unflatten(1, (states.size(1), -1)).sum(2).to(states.dtype)


# Sequences are padded and computed in one call where they are short, because a call then costs more than what it
# computes: those of at least this share of the longest, by the most tokens that the longest has.
SIMILAR_LENGTH = {64: 0.5, 128: 0.8}


class CpuKernel:
    """torch's flash attention for CPUs, in a call for each sequence, or for several of similar length, side by side.

    States are taken as `(N, key heads, R, size)`, where `R` heads share a key head, so that keys and values are not
    copied `R` times; those of a single sequence are not copied at all.
    """

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys, values = (states.unflatten(1, (key.size(1), -1)) for states in (query, key, value))
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        log_sum_exp = output.new_empty(output.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, seen in self._calls(spans):
            part, part_log_sum_exp = compat.flash_attention_on_cpu(
                _take(queries, rows),
                _take_shared(keys, seen, queries),
                _take_shared(values, seen, queries),
                0.0,
                spans.is_causal,
                scale=scale,
            )
            _put(output, rows, part)
            _put(log_sum_exp, rows, part_log_sum_exp)
        return output.flatten(1, 2), log_sum_exp.flatten(1, 2).t().contiguous()

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradients, queries, keys, values, outputs, log_sum_exps = (
            states.unflatten(1, (key.size(1), -1))
            for states in (gradient, query, key, value, output, log_sum_exp.t().contiguous())
        )
        of_queries, of_keys, of_values = (
            torch.empty_like(states, memory_format=torch.contiguous_format) for states in (queries, keys, values)
        )
        for rows, seen in self._calls(spans):
            parts = compat.flash_attention_on_cpu_backward(
                _take(gradients, rows, zero_padding=True),
                _take(queries, rows),
                _take_shared(keys, seen, queries),
                _take_shared(values, seen, queries),
                _take(outputs, rows),
                _take(log_sum_exps, rows),
                0.0,
                spans.is_causal,
                scale=scale,
            )
            _put(of_queries, rows, parts[0])
            _put(of_keys, seen, parts[1].sum(1, keepdim=True))
            _put(of_values, seen, parts[2].sum(1, keepdim=True))
        return of_queries.flatten(1, 2), of_keys.flatten(1, 2), of_values.flatten(1, 2)

    @staticmethod
    def _calls(spans: Spans) -> Sequence[tuple["Places", "Places"]]:
        """What goes into each call: queries and keys."""
        if not spans.is_causal:
            return list(spans.each())
        return [(places, places) for places in _side_by_side(tuple(spans.queries.tolist()))]


class SideBySide:
    """Several sequences that are computed in one call, each padded to the longest with its own last token."""

    def __init__(self, sequences: list[slice]) -> None:
        lengths = torch.tensor([sequence.stop - sequence.start for sequence in sequences]).unsqueeze(1)
        starts = torch.tensor([sequence.start for sequence in sequences]).unsqueeze(1)
        self.length = int(lengths.max())
        columns = torch.arange(self.length)
        self._places = starts + torch.minimum(columns, lengths - 1)
        self._is_token = columns < lengths
        self._rows: dict[int, tuple[torch.Tensor, ...]] = {}  # the same for all layers with as many key heads

    def rows(self, num_key_heads: int) -> tuple[torch.Tensor, ...]:
        """Where the `(N * key heads)` rows of a packed row's states go.

        Returns:
            `tuple[torch.Tensor, ...]`:
                The rows that make up `(sequences, key heads, length)`; which of these are padding; those that are
                tokens; and the rows where tokens come from.
        """
        if num_key_heads not in self._rows:
            rows = (self._places.unsqueeze(1) * num_key_heads + torch.arange(num_key_heads).view(1, -1, 1)).flatten()
            is_token = self._is_token.unsqueeze(1).expand(-1, num_key_heads, -1).flatten()
            tokens = is_token.nonzero().flatten()
            self._rows[num_key_heads] = rows, ~is_token, tokens, rows[tokens]
        return self._rows[num_key_heads]


Places = slice | SideBySide


@functools.lru_cache(maxsize=64)  # all layers of a forward, all passes over a batch
def _side_by_side(ends: tuple[int, ...]) -> list[Places]:
    """Sequences, by their cumulative lengths, or several of similar length."""
    batches: list[list[slice]] = []
    shortest = 0.0  # of those that go with the last batch
    for begin, end in sorted(pairwise(ends), key=lambda sequence: sequence[0] - sequence[1]):
        length = end - begin
        if batches and length >= shortest:
            batches[-1].append(slice(begin, end))
        else:
            batches.append([slice(begin, end)])
            shortest = length * next((share for most, share in SIMILAR_LENGTH.items() if length <= most), math.inf)
    return [batch[0] if len(batch) == 1 else SideBySide(batch) for batch in batches]


def _take(states: torch.Tensor, places: Places, zero_padding: bool = False) -> torch.Tensor:
    """`(N, key heads, R, ...)` as the kernel takes it: `(key heads, R, n, ...)`, or that for each of several.

    Padding repeats a sequence's last token, whose gradient would then count more than once: in gradients it is 0.
    """
    if isinstance(places, slice):
        return states[places].movedim(0, 2)
    rows, is_padding, _, _ = places.rows(states.size(1))
    taken = states.flatten(0, 1).index_select(0, rows)
    if zero_padding:
        taken.masked_fill_(is_padding.view(-1, 1, 1), 0.0)
    return taken.unflatten(0, (-1, places.length)).transpose(1, 2)


def _take_shared(states: torch.Tensor, places: Places, queries: torch.Tensor) -> torch.Tensor:
    """[`_take`] for keys and values: `R` times the same, without a copy."""
    return _take(states, places).expand(-1, queries.size(2), -1, -1)


def _put(states: torch.Tensor, places: Places, part: torch.Tensor) -> None:
    if isinstance(places, slice):
        states[places] = part.movedim(2, 0)
        return
    _, _, tokens, rows = places.rows(states.size(1))
    states.flatten(0, 1).index_copy_(0, rows, part.transpose(1, 2).flatten(0, 1).index_select(0, tokens))


class FlashKernel:
    """torch's own FlashAttention on GPUs: all sequences in one launch, and grouped queries as they are.

    `torch.nn.attention.activate_flash_attention_impl("FA3")` makes it FlashAttention 3.
    """

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, log_sum_exp, *_ = compat.flash_attention(
            query,
            key,
            value,
            spans.queries,
            spans.keys,
            spans.longest_queries,
            spans.longest_keys,
            0.0,
            spans.is_causal,
            False,
            scale=scale,
        )
        return output, log_sum_exp

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        log_sum_exp: torch.Tensor,
        spans: Spans,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of_dropout = torch.empty(2, dtype=torch.uint64, device=query.device), query.new_empty(0)  # there is none
        of_query, of_key, of_value = compat.flash_attention_backward(
            gradient.contiguous(),
            query,
            key,
            value,
            output,
            # The kernel reads it by a pointer and the number of tokens, and does not look at strides.
            log_sum_exp.contiguous(),
            spans.queries,
            spans.keys,
            spans.longest_queries,
            spans.longest_keys,
            0.0,
            spans.is_causal,
            *of_dropout,
            scale=scale,
        )
        return of_query, of_key, of_value


KERNELS: dict[str, Kernel] = {"cpu": CpuKernel(), "cuda": FlashKernel()}


def merged_forward(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calls: Calls,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, `(N, heads, size)`, and log-sum-exp, `(heads, N)`, of each query of a packed row over all that it sees.

    Args:
        kernel ([`Kernel`]):
            What computes.
        query (`torch.Tensor`), key (`torch.Tensor`), value (`torch.Tensor`):
            States of the row, `(N, heads, size)` and `(N, key heads, size)`.
        calls ([`Calls`]):
            What sees what.
        scale (`float`):
            Factor of the scores.
    """
    output, log_sum_exp = kernel.forward(query, key, value, calls.own, scale)
    if log_sum_exp.shape != (query.size(1), query.size(0)):  # some builds pad them
        raise ValueError(f"log-sum-exps are of shape {tuple(log_sum_exp.shape)}, not (heads, tokens)")
    if calls.shared_end > calls.prefix_end:
        rows, prefixes = slice(calls.prefix_end, calls.shared_end), slice(0, calls.prefix_end)
        part, part_log_sum_exp = kernel.forward(query[rows], key[prefixes], value[prefixes], calls.over_prefix, scale)
        own, own_log_sum_exp = output[rows], log_sum_exp[:, rows]
        # In fp32: a weight of half precision would double the output's error.
        weight = torch.sigmoid(part_log_sum_exp - own_log_sum_exp).t().unsqueeze(-1)
        output[rows] = torch.lerp(own.to(weight.dtype), part.to(weight.dtype), weight).to(output.dtype)
        log_sum_exp[:, rows] = torch.logaddexp(own_log_sum_exp, part_log_sum_exp)
    return output, log_sum_exp


def merged_backward(
    kernel: Kernel,
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    calls: Calls,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values from that of [`merged_forward`]'s output; arguments are the same.

    Both calls get the merged output and log-sum-exp, as this file begins by saying, and what they give adds up.
    """
    of_query, of_key, of_value = kernel.backward(gradient, query, key, value, output, log_sum_exp, calls.own, scale)
    if calls.shared_end > calls.prefix_end:
        rows, prefixes = slice(calls.prefix_end, calls.shared_end), slice(0, calls.prefix_end)
        parts = kernel.backward(
            gradient[rows],
            query[rows],
            key[prefixes],
            value[prefixes],
            output[rows],
            log_sum_exp[:, rows],
            calls.over_prefix,
            scale,
        )
        for states, places, part in zip((of_query, of_key, of_value), (rows, prefixes, prefixes), parts, strict=True):
            states[places] += part
    return of_query, of_key, of_value


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pieces: torch.Tensor,
    prefix_queries: torch.Tensor,
    prefix_keys: torch.Tensor,
    longest_piece: int,
    longest_prefix_queries: int,
    longest_prefix_keys: int,
    prefix_end: int,
    shared_end: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = longest_piece, longest_prefix_queries, longest_prefix_keys
    calls = Calls(pieces, prefix_queries, prefix_keys, *longest, prefix_end, shared_end)
    output, log_sum_exp = merged_forward(KERNELS[query.device.type], query, key, value, calls, scale)
    return output.contiguous(), log_sum_exp.contiguous()  # as compilers are told


def _fake_forward(query: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((query.size(1), query.size(0)), dtype=wide)


def _gradients(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    pieces: torch.Tensor,
    prefix_queries: torch.Tensor,
    prefix_keys: torch.Tensor,
    longest_piece: int,
    longest_prefix_queries: int,
    longest_prefix_keys: int,
    prefix_end: int,
    shared_end: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = longest_piece, longest_prefix_queries, longest_prefix_keys
    calls = Calls(pieces, prefix_queries, prefix_keys, *longest, prefix_end, shared_end)
    states = query, key, value, output, log_sum_exp
    gradients = merged_backward(KERNELS[query.device.type], gradient, *states, calls, scale)
    return gradients[0].contiguous(), gradients[1].contiguous(), gradients[2].contiguous()


def _fake_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any
) -> Any:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, pieces, prefix_queries, prefix_keys, *ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, pieces, prefix_queries, prefix_keys)


def _backward(compute: Callable[..., tuple[torch.Tensor, ...]], ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    gradients = compute(gradient, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None,) * (len(ctx.needs_input_grad) - 3))


_operator = torch.library.custom_op("trl_grpo_ext::packed_attention", _forward, mutates_args=())
_operator_backward = torch.library.custom_op("trl_grpo_ext::packed_attention_backward", _gradients, mutates_args=())
_operator.register_fake(_fake_forward)
_operator_backward.register_fake(_fake_gradients)
_operator.register_autograd(
    lambda ctx, gradient, _: _backward(_operator_backward, ctx, gradient), setup_context=_setup_context
)


class _Function(torch.autograd.Function):
    """The operator without its way through the dispatcher, which takes a host longer than launching a short row."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
        return _backward(_gradients, ctx, gradient)


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout, scale: float | None = None
) -> torch.Tensor:
    """Attention over a packed row, with its gradient, by the kernel of the device.

    Args:
        query (`torch.Tensor`):
            `(N, heads, size)`.
        key (`torch.Tensor`), value (`torch.Tensor`):
            `(N, key heads, size)`; as many heads as the queries have, or a divisor of it.
        layout ([`PackedLayout`]):
            The packed row.
        scale (`float`, *optional*):
            Factor of the scores; by default `1 / sqrt(size)`.

    Returns:
        `torch.Tensor`:
            `(N, heads, size)`.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    attend = _operator if torch.compiler.is_compiling() else _Function.apply
    output: torch.Tensor = attend(query, key, value, *Calls.of(layout), scale)[0]
    return output


# Which states a kernel takes


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether [`packed_attention`] can be had for such states; asked for the first time on a GPU, it waits for it."""
    if value.size(-1) != query.size(-1) or query.device.type not in KERNELS:
        return False
    return why_not(query.device, query.dtype, query.size(-1), query.size(-2) // key.size(-2)) is None


# The largest relative error of a kernel's output and gradients in a trial; in half precision the states' own rounding.
_TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 1e-1}

_OBSTACLES: dict[tuple[Any, ...], str | None] = {}  # what was found, for each kind of states


@torch.compiler.assume_constant_result  # compilers then ask once, and find what the comparison of rows has found
def why_not(device: torch.device, dtype: torch.dtype, head_size: int, heads_per_key_head: int) -> str | None:
    """Why attention over a packed row is computed segment by segment; `None` if by a [`Kernel`].

    What torch's flash attention takes depends on the card, the build and the release, and it does not say where its
    log-sum-exps have another form (ROCm's have). So a few tiny rows are computed once, and held against plain torch.
    """
    if device.type == "cpu":
        return None
    states = device, dtype, head_size, heads_per_key_head
    tried = *states, compat.flash_attention_in_use()
    if tried not in _OBSTACLES:
        _OBSTACLES[tried] = _find_obstacle(*states)
    return _OBSTACLES[tried]


def _find_obstacle(device: torch.device, dtype: torch.dtype, head_size: int, heads_per_key_head: int) -> str | None:
    obstacle: str | None
    level = logging.INFO
    if dtype not in _TOLERANCES:
        obstacle = f"torch's flash attention is for half precision, and this is {dtype}"
    elif head_size % 8 or head_size > 256:
        obstacle = f"torch's flash attention takes heads of up to 256, in steps of 8, and these are of {head_size}"
    else:
        obstacle = _trial(KERNELS[device.type], device, dtype, head_size, heads_per_key_head)
        level = logging.INFO if obstacle is None else logging.WARNING  # states that it takes on most cards
    means = "two calls a layer of torch's flash attention" if obstacle is None else f"a call a completion: {obstacle}"
    logger.log(level, f"Packed attention on {device} ({dtype}, heads of {head_size}): {means}.")
    return obstacle


@torch.no_grad()
def _trial(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_size: int, heads_per_key_head: int
) -> str | None:
    """What is wrong with a kernel on a device, by two packed rows; `None` if nothing."""
    # In the second each prefix is seen by a single query, for which FlashAttention has a way of its own.
    several, single = [Row(0, 5, 3), Row(0, 5, 1), Row(1, 1, 4), Row(2, 9, 1)], [Row(0, 5, 1), Row(1, 9, 1)]
    numbers = torch.Generator().manual_seed(0)
    heads = 2 * heads_per_key_head
    for layout in on_device([lay_out(rows, 9, 4) for rows in (several, single)], device):
        query, key, value, gradient = (
            torch.randn(layout.num_tokens, count, head_size, generator=numbers).to(device, dtype)
            for count in (heads, 2, 2, heads)
        )
        calls, scale = Calls.of(layout), head_size**-0.5
        results: list[tuple[torch.Tensor, ...]] = []
        try:
            for each in (kernel, ReferenceKernel()):
                output, log_sum_exp = merged_forward(each, query, key, value, calls, scale)
                gradients = merged_backward(each, gradient, query, key, value, output, log_sum_exp, calls, scale)
                results.append((output, *gradients))
        except Exception as error:  # whatever a build or a card lacks
            return f"it fails ({type(error).__name__}: {one_line(error)})"
        for found, expected in zip(*results, strict=True):
            difference = torch.linalg.vector_norm(found.float() - expected.float())
            if not difference <= _TOLERANCES[dtype] * torch.linalg.vector_norm(expected.float()):
                return "its results are not those of plain torch"
    return None
