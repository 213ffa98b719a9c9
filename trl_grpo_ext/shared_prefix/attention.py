"""Attention over a packed row, put around transformers' own under its own name.

A layer passes its queries, keys and values of the whole packed row, and the [`Segments`] that the model was called
with. Each segment sees its prefix and, causally, itself.

What transformers has registered under the name of the model's attention (`"sdpa"`, `"flash_attention_2"`, a kernel of
the hub) is wrapped, for the whole process: called with segments it is [`shared_prefix_attention`], called without
them, the function that was there. No model and no configuration is changed, so that generation, continuous batching,
padded forwards, saved models and other trainers on the same model find all as it was. The wrapper stays, because
gradient checkpointing calls it in the backward too.

Whatever the name, a packed row is computed by torch's own kernels, see [`trl_grpo_ext.shared_prefix.kernels`]; states
that they do not take, by a call of `scaled_dot_product_attention` for each segment.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward, get_target_dtype
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import kernels
from .layout import PackedLayout


class Segments:
    """What a layer needs to know of a packed row; one object for all layers of a forward.

    Args:
        layout ([`PackedLayout`]):
            The packed row.
    """

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout
        self.num_uses = 0  # by layers


def why_not_wrapped(name: str) -> str | None:
    """Why an attention implementation of transformers cannot be wrapped; `None` if it can.

    What users register under names of their own may compute something else than attention as it is known here.
    """
    if name in ("sdpa", "flex_attention") or (name in ALL_ATTENTION_FUNCTIONS and _is_flash(name)):
        return None
    return (
        f"attn_implementation is {name!r}; sdpa, flex_attention, flash attention and the hub's kernels can be packed"
    )


def _is_flash(name: str) -> bool:
    """Whether transformers calls flash attention under a name: a package's, or a kernel's of the hub."""
    return name.startswith("flash_attention_") or _stock(name) is flash_attention_forward


def _stock(name: str) -> Callable[..., Any]:
    function = ALL_ATTENTION_FUNCTIONS[name]
    return getattr(function, "without_segments", function)


def attend_over_segments(name: str) -> None:
    """Wrap the function that transformers calls for an attention implementation, unless it is wrapped already."""
    stock = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(stock, "without_segments"):
        wrapper = _with_segments(stock, casts=_is_flash(name))
        AttentionInterface.register(name, wrapper)
        if ALL_ATTENTION_FUNCTIONS[name] is not wrapper:  # some set theirs on this object, which looks there first
            ALL_ATTENTION_FUNCTIONS[name] = wrapper


def _with_segments(stock: Callable[..., Any], casts: bool) -> Callable[..., Any]:
    @functools.wraps(stock)
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> Any:
        if segments is None:
            return stock(module, query, key, value, *args, **kwargs)
        if casts and (dtype := get_target_dtype(query, module)) is not None:
            # Where norms or adapters have made states wider than the model is, flash attention goes back to its type.
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return shared_prefix_attention(module, query, key, value, *args, segments=segments, **kwargs)

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
    if not torch.compiler.is_compiling():  # what is counted in a graph would break it
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
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if dropout == 0.0 and kernels.takes(queries, keys, values):
        output = kernels.packed_attention(queries, keys, values, segments.layout, scaling).unsqueeze(0)
    else:
        output = _attention_by_segment(query, key, value, dropout, scaling, segments)
    return output, None


@torch.compiler.disable
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

    layout = segments.layout
    outputs = [attend(group.prefix, group.prefix) for group in layout.groups if len(group.prefix)]
    outputs += [attend(segment, group.prefix, segment) for group in layout.groups for segment in group.segments]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()
