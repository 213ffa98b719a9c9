"""Generation that computes each prompt once: its keys and values are copied to all of its completions."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode


@contextmanager
def shared_prefill(model: PreTrainedModel) -> Iterator[None]:
    """Within it `model.generate` prefills a prompt once for all its rows; what it samples has the same distribution.

    Args:
        model (`PreTrainedModel`):
            A decoder with a cache of keys and values. Generation with inputs other than `input_ids` and
            `attention_mask`, with another kind of cache, or that does more than continue each row by itself (beams,
            speculation, several sequences for a row), is left as it is, and so is a model with a `generate` that is
            not transformers' own.
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
            and _takes_a_filled_cache(model, options.get("generation_config"))
            and (cache := _prefilled(model, options["input_ids"], options["attention_mask"])) is not None
        ):
            options["past_key_values"] = cache
        return generate(*args, **options)

    model.generate = generate_from_shared_prompts
    try:
        yield
    finally:
        if vars(model).get("generate") is generate_from_shared_prompts:
            del model.generate  # the instance's, which hides the class's


def _takes_a_filled_cache(model: PreTrainedModel, generation_config: GenerationConfig | None) -> bool:
    """Whether `generate` would make the cache that it can be given, and go on from it with each row by itself."""
    config = GenerationConfig() if generation_config is None else deepcopy(generation_config)
    # What the call does not say, the model says: `generate` itself begins with this line.
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return (
        config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and config.num_return_sequences in (None, 1)
        and config.use_cache is not False
        # It refuses a cache together with the name of one, "dynamic" included; "hybrid" is its old name for none.
        and config.cache_implementation in (None, "hybrid")
        and config.prefill_chunk_size is None  # whoever sets it has no memory for a whole prefill
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
