"""Attention over a packed row, put around transformers' own under its own name.

A layer passes its queries, keys and values of the whole packed row, and the [`Segments`] that the model was called
with. Each segment sees its prefix and, causally, itself.

What transformers has registered as `"sdpa"` is wrapped, for the whole process: called with segments it is
[`shared_prefix_attention`], called without them, the function that was there. No model and no configuration is
changed, so that generation, continuous batching, padded forwards, saved models and other trainers on the same model
find all as it was. The wrapper stays, because gradient checkpointing calls it in the backward too.

On a CPU attention over the prefix and over the segment are computed apart and put together by their log-sum-exps: all
segments of a group then share one call for the prefix, nothing is copied, and nothing masked is computed. That is how
FlashAttention (https://huggingface.co/papers/2205.14135) puts its blocks together, and the decomposition of Hydragen
(https://huggingface.co/papers/2402.05099), here with its gradient. Elsewhere each segment is one call of
`scaled_dot_product_attention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import compat
from .layout import PackedLayout


STOCK = "sdpa"

# Segments of at most this length, or of at least this share of the longest, are padded and computed in one call: where
# they are short a call costs more than what it computes.
SHORT_TOKENS, SIMILAR_LENGTH = 64, 0.8


class Segments:
    """What a layer needs to know of a packed row; one object for all layers of a forward.

    Args:
        layout ([`PackedLayout`]):
            The packed row.
    """

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout
        self.num_uses = 0  # by layers
        # What sees what: queries, whether causally, keys. Causal calls come first, and take in each token once.
        self.calls: list[tuple[Places, bool, Places]] = []
        segments = [segment for group in layout.groups for segment in group.segments]
        for places in [
            *(group.prefix for group in layout.groups if len(group.prefix)),
            *(batch[0] if len(batch) == 1 else SideBySide(batch) for batch in _batches_of_similar_length(segments)),
        ]:
            self.calls.append((places, True, places))
        for group in layout.groups:
            if len(group.prefix) and group.segments:
                self.calls.append((range(group.segments[0].start, group.segments[-1].stop), False, group.prefix))


class SideBySide:
    """Several segments that are computed in one call, each padded to the longest with its own last token."""

    def __init__(self, segments: list[range]) -> None:
        self.length = len(segments[0])
        columns = torch.arange(self.length)
        lengths = torch.tensor([len(segment) for segment in segments]).unsqueeze(1)
        starts = torch.tensor([segment.start for segment in segments]).unsqueeze(1)
        self._places = starts + torch.minimum(columns, lengths - 1)
        self._is_token = columns < lengths
        self._rows: dict[int, tuple[torch.Tensor, ...]] = {}  # the same for all layers with as many key heads

    def rows(self, num_key_heads: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Where the `(N * key heads)` rows of a packed row's states go.

        Returns:
            `tuple[torch.Tensor, ...]`:
                The rows that make up `(segments, key heads, length)`; which of these are padding; those that are
                tokens; and the rows where tokens come from.
        """
        if num_key_heads not in self._rows:
            rows = (self._places.unsqueeze(1) * num_key_heads + torch.arange(num_key_heads).view(1, -1, 1)).flatten()
            is_token = self._is_token.unsqueeze(1).expand(-1, num_key_heads, -1).flatten()
            tokens = is_token.nonzero().flatten()
            found = rows, ~is_token, tokens, rows[tokens]
            self._rows[num_key_heads] = tuple(tensor.to(device) for tensor in found)
        return self._rows[num_key_heads]


# What a call computes on: a run of tokens, or several segments side by side.
Places = range | SideBySide


def _batches_of_similar_length(segments: list[range]) -> list[list[range]]:
    batches: list[list[range]] = []
    for segment in sorted(segments, key=len, reverse=True):
        longest = len(batches[-1][0]) if batches else 0
        if longest and (longest <= SHORT_TOKENS or len(segment) >= SIMILAR_LENGTH * longest):
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return batches


def attend_over_segments() -> None:
    """Wrap the function that transformers calls for `"sdpa"`, unless it is wrapped already."""
    stock = ALL_ATTENTION_FUNCTIONS[STOCK]
    if not hasattr(stock, "without_segments"):
        AttentionInterface.register(STOCK, _with_segments(stock))


def _with_segments(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def attention(*args: Any, segments: Segments | None = None, **kwargs: Any) -> Any:
        if segments is None:
            return stock(*args, **kwargs)
        return shared_prefix_attention(*args, segments=segments, **kwargs)

    attention.without_segments = stock  # type: ignore[attr-defined]
    return attention


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    segments: Segments,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a layer over a packed row, in the form that transformers' `AttentionInterface` asks for.

    Args:
        module (`nn.Module`):
            The attention layer.
        query (`torch.Tensor`):
            Queries, `(1, heads, N, head size)`.
        key (`torch.Tensor`), value (`torch.Tensor`):
            Keys and values, `(1, key heads, N, head size)`; as many heads as the queries have, or a divisor of it.
        attention_mask (`torch.Tensor`, *optional*):
            A single element, which says nothing: what sees what is in the segments.
        dropout (`float`, *optional*, defaults to `0.0`), scaling (`float`, *optional*):
            Dropout of the weights, and the factor of the scores (by default `1 / sqrt(head size)`).
        segments ([`Segments`]):
            The packed row.

    Returns:
        `tuple[torch.Tensor, None]`:
            The output, `(1, N, heads, head size)`.

    Raises:
        ValueError: If the layer asks for something that attention over segments does not do.
    """
    segments.num_uses += 1
    if attention_mask is not None and attention_mask.numel() != 1:
        raise ValueError("the attention layer makes a mask of its own, which attention over segments does not know")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"the attention layer passes {name!r}, which attention over segments does not know")
    window = kwargs.get("sliding_window")
    if window is not None and window < segments.layout.longest_sequence:
        raise ValueError(f"a sliding window of {window} is shorter than the longest row")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type == "cpu" and dropout == 0.0 and query.size(-1) == value.size(-1):
        output: torch.Tensor = _MergedAttention.apply(query, key, value, scaling, segments)
    else:
        output = _attention_by_segment(query, key, value, dropout, scaling, segments)
    return output, None


def _attention_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    segments: Segments,
) -> torch.Tensor:
    def attend(queries: range, *seen: range) -> torch.Tensor:
        def rows(states: torch.Tensor, places: range) -> torch.Tensor:
            return states[:, :, places.start : places.stop]

        keys = torch.cat([rows(key, places) for places in seen], dim=2)
        return nn.functional.scaled_dot_product_attention(
            rows(query, queries),
            keys,
            torch.cat([rows(value, places) for places in seen], dim=2),
            attn_mask=causal_lower_right(len(queries), keys.size(2)),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.size(1) != key.size(1),
        )

    outputs = []
    for group in segments.layout.groups:
        if len(group.prefix):
            outputs.append(attend(group.prefix, group.prefix))
        outputs += [attend(segment, group.prefix, segment) for segment in group.segments]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class _MergedAttention(torch.autograd.Function):
    """Attention over prefixes and segments apart, merged; `(1, N, heads, head size)` of `(1, heads, N, head size)`.

    States are taken as `(N, key heads, R, head size)`, where `R` heads share a key head, so that keys and values are
    not copied `R` times. The kernel's backward takes the output and the log-sum-exp of a query over all that it saw,
    and so gives the gradient of each part of what it saw.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        segments: Segments,
    ) -> torch.Tensor:
        queries, keys, values = (_by_token(states, key.size(1)) for states in (query, key, value))
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        log_sum_exp = output.new_empty(output.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for places, is_causal, seen in segments.calls:
            part, part_log_sum_exp = compat.flash_attention_on_cpu(
                _take(queries, places),
                _take_shared(keys, seen, queries),
                _take_shared(values, seen, queries),
                0.0,
                is_causal,
                scale=scaling,
            )
            if is_causal:  # each query's first call: a prefix, or segments by themselves
                _put(output, places, part)
                _put(log_sum_exp, places, part_log_sum_exp)
            else:  # segments over their prefix
                own, own_log_sum_exp = _take(output, places), _take(log_sum_exp, places)
                weight = torch.sigmoid(part_log_sum_exp - own_log_sum_exp).unsqueeze(-1).to(part.dtype)
                _put(output, places, torch.lerp(own, part, weight))
                _put(log_sum_exp, places, torch.logaddexp(own_log_sum_exp, part_log_sum_exp))
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.scaling, ctx.segments = scaling, segments
        return output.flatten(1, 2).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        queries, keys, values, gradient = (
            _by_token(states, key.size(1)) for states in (query, key, value, gradients[0].transpose(1, 2))
        )
        of_queries, of_keys, of_values = (
            torch.empty_like(states, memory_format=torch.contiguous_format) for states in (queries, keys, values)
        )
        for places, is_causal, seen in ctx.segments.calls:
            parts = compat.flash_attention_on_cpu_backward(
                _take(gradient, places, zero_padding=True),
                _take(queries, places),
                _take_shared(keys, seen, queries),
                _take_shared(values, seen, queries),
                _take(output, places),
                _take(log_sum_exp, places),
                0.0,
                is_causal,
                scale=ctx.scaling,
            )
            put = _put if is_causal else _add  # each token is in one causal call, and that comes first
            put(of_queries, places, parts[0])
            put(of_keys, seen, parts[1].sum(1, keepdim=True))
            put(of_values, seen, parts[2].sum(1, keepdim=True))
        return (
            *(states.flatten(1, 2).transpose(0, 1).unsqueeze(0) for states in (of_queries, of_keys, of_values)),
            None,
            None,
        )


def _by_token(states: torch.Tensor, num_key_heads: int) -> torch.Tensor:
    """`(1, heads, N, size)` as `(N, key heads, heads / key heads, size)`."""
    return states[0].transpose(0, 1).unflatten(1, (num_key_heads, -1))


def _take(states: torch.Tensor, places: Places, zero_padding: bool = False) -> torch.Tensor:
    """`(N, key heads, R, ...)` as the kernel takes it: `(key heads, R, n, ...)`, or that for each of the segments."""
    if isinstance(places, range):
        return states[places.start : places.stop].movedim(0, 2)
    rows, is_padding, _, _ = places.rows(states.size(1), states.device)
    taken = states.flatten(0, 1).index_select(0, rows)
    if zero_padding:
        taken[is_padding] = 0
    return taken.unflatten(0, (-1, places.length)).transpose(1, 2)


def _take_shared(states: torch.Tensor, places: Places, queries: torch.Tensor) -> torch.Tensor:
    """[`_take`] for keys and values: `R` times the same, without a copy."""
    return _take(states, places).expand(-1, queries.size(2), -1, -1)


def _put(states: torch.Tensor, places: Places, part: torch.Tensor) -> None:
    if isinstance(places, range):
        states[places.start : places.stop] = part.movedim(2, 0)
        return
    _, _, tokens, rows = places.rows(states.size(1), states.device)
    states.flatten(0, 1).index_copy_(0, rows, part.transpose(1, 2).flatten(0, 1).index_select(0, tokens))


def _add(states: torch.Tensor, places: Places, part: torch.Tensor) -> None:
    assert isinstance(places, range)
    states[places.start : places.stop] += part.movedim(2, 0)
