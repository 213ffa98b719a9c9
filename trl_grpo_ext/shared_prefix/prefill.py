"""Generation that computes each prompt once: its keys and values are copied to all of its completions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel


@contextmanager
def shared_prefill(model: PreTrainedModel) -> Iterator[None]:
    """Within it `model.generate` prefills a prompt once for all its rows; what it samples has the same distribution.

    Args:
        model (`PreTrainedModel`):
            A decoder with a cache of keys and values. Generation with inputs other than `input_ids` and
            `attention_mask`, or with another kind of cache, is left as it is, and so is a model with a `generate` that
            is not transformers' own.
    """
    if "generate" in vars(model) or type(model).generate is not GenerationMixin.generate:
        yield
        return
    generate = model.generate

    def generate_from_shared_prompts(*args: Any, **options: Any) -> Any:
        inputs = set(options) - {"generation_config", "disable_compile"}
        if (
            not args
            and inputs == {"input_ids", "attention_mask"}
            and _uses_dynamic_cache(model, options.get("generation_config"))
        ):
            options["past_key_values"] = _prefilled(model, options["input_ids"], options["attention_mask"])
        return generate(*args, **options)

    model.generate = generate_from_shared_prompts
    try:
        yield
    finally:
        if vars(model).get("generate") is generate_from_shared_prompts:
            del model.generate  # the instance's, which hides the class's


def _uses_dynamic_cache(model: PreTrainedModel, generation_config: Any) -> bool:
    def setting(name: str) -> Any:
        """What the call says, or else the model."""
        values = (getattr(config, name, None) for config in (generation_config, model.generation_config))
        return next((value for value in values if value is not None), None)

    return (
        setting("use_cache") is not False
        and setting("cache_implementation") in (None, "dynamic")
        and setting("num_beams") in (None, 1)
    )


def _prefilled(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DynamicCache | None:
    """The cache after all prompt tokens but the last, one row for each of `input_ids`; `None` if nothing is shared."""
    rows = torch.stack([input_ids, attention_mask], dim=1)
    distinct, row_of = torch.unique(rows, dim=0, return_inverse=True)
    if len(distinct) == len(rows) or input_ids.size(1) == 1:
        return None
    ids, mask = distinct[:, 0, :-1], distinct[:, 1, :-1]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    cache.batch_select_indices(row_of)
    return cache
