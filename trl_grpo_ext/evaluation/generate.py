"""Completions for an evaluation, from transformers or from vLLM: text, number of tokens, and why it ends.

A sample must be the same whatever it is generated together with, so its random numbers are its own: a stream that is
seeded from the evaluation's seed, the problem and the number of the sample. The Gumbel-max trick (Maddison, Tarlow and
Minka, arXiv 1411.0030) makes samples of them: the largest of `logits / temperature + noise` is distributed as softmax
says. Rounding moves it to another token about as rarely as it does without noise; drawing from cumulated
probabilities, the rounding of all tokens before it would count.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)


if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import LLM


@dataclass(frozen=True)
class Request:
    """A completion to be generated.

    Args:
        prompt_ids (`list[int]`):
            The prompt's tokens.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; 0.0 decodes greedily.
        stream (`int`, *optional*, defaults to `0`):
            Seed of the random numbers that it is sampled with, see [`stream_of`].
    """

    prompt_ids: list[int]
    temperature: float = 0.0
    stream: int = 0


@dataclass(frozen=True)
class Completion:
    """A completion.

    Args:
        text (`str`):
            The text, special tokens left out.
        tokens (`int`):
            Number of generated tokens, with the one that ends it.
        finish_reason (`str`):
            `"stop"` if the last token is one that ends a completion, else `"length"`.
    """

    text: str
    tokens: int
    finish_reason: str


def stream_of(seed: int, problem: str | int, sample: int) -> int:
    """The seed of a sample's random numbers, of 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, problem, sample]).encode()).digest()[:8]) >> 1


def to_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]], **chat_template_kwargs: Any
) -> list[int]:
    """A prompt's tokens, as TRL makes them.

    Raises:
        ValueError: If the prompt is conversational and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are messages and the tokenizer has no chat template: set tokenizer.chat_template, or make "
            "the prompts texts"
        )
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
    )["input_ids"]


def end_ids_of(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those that the model's generation settings name."""
    ids = getattr(generation_config, "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


class GumbelNoise(LogitsProcessor):
    """Makes a greedy choice a sample at a temperature, with random numbers of each row's own.

    A row draws as many numbers in each step as there are logits, whatever other rows do. In double precision where the
    device has it: 24 bits of a number in single precision would cut the tail of the distribution off at 1e-7.

    Args:
        temperature (`float`):
            Sampling temperature, above 0.
        streams (`Sequence[int]`):
            The seed of each row's random numbers.
        device (`torch.device`):
            Where the logits are.
    """

    def __init__(self, temperature: float, streams: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(stream) for stream in streams]
        self.dtype = torch.float32 if device.type == "mps" else torch.float64

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, dtype=self.dtype, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.uniform_(generator=generator)  # from 0 up to and without 1
        return noise.log_().neg_().log_().neg_().add_(scores / self.temperature)


@contextmanager
def _generation_config_in_place(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model's own generation settings replaced: `generate` takes from them whatever is set in them alone."""
    holder = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    before = holder.generation_config
    holder.generation_config = config
    try:
        yield
    finally:
        holder.generation_config = before


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int] | None = None,
) -> list[Completion]:
    """Generate completions with `model.generate`, all at once.

    Args:
        model (`PreTrainedModel`):
            The policy, in evaluation mode; its own generation settings (top-k, repetition penalty) are not used.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        requests (`Sequence[Request]`):
            What to complete, all at one temperature.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        end_ids (`Sequence[int]`, *optional*):
            Tokens that end a completion; by default those of [`end_ids_of`].

    Returns:
        `list[Completion]`:
            One for each request.
    """
    if not requests:
        return []
    (temperature,) = {request.temperature for request in requests}
    end_ids = end_ids_of(tokenizer, model.generation_config) if end_ids is None else end_ids
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad_id = 0 if pad_id is None else pad_id  # whichever: it is masked, and left out behind the end
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
        disable_compile=True,
    )
    device = model.device
    rows = [torch.tensor(request.prompt_ids, device=device) for request in requests]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    noise = [GumbelNoise(temperature, [request.stream for request in requests], device)] if temperature > 0 else []
    with torch.no_grad(), _generation_config_in_place(model, config):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(noise),
        )
    return [_to_completion(tokenizer, ids, end_ids) for ids in output[:, input_ids.size(1) :].tolist()]


def generate_with_trainers_vllm(
    vllm: "VLLMGeneration",
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    seed: int,
) -> list[Completion]:
    """[`generate`] with a trainer's vLLM; its settings are as before afterwards.

    TRL gives all requests of a call the same settings, one seed included. So samples are drawn from the process's
    generator, which `seed` is for, or from a server's, which no seed reaches.
    """
    (temperature,) = {request.temperature for request in requests}
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_completion_length": max_new_tokens,
        "structured_outputs_regex": None,
        "generation_kwargs": {},
    }
    before = {name: getattr(vllm, name) for name in settings}
    vars(vllm).update(settings)
    set_seed(seed % 2**32)
    try:
        completion_ids = vllm.generate([request.prompt_ids for request in requests], images=None, num_generations=1)[1]
    finally:
        vars(vllm).update(before)
    return [_to_completion(tokenizer, ids, end_ids) for ids in completion_ids]


def generate_with_vllm(
    vllm: "LLM",
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    shows_progress: bool = False,
) -> list[Completion]:
    """[`generate`] with a vLLM of one's own, which seeds each request, with a bar of its own if that is asked for."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=request.temperature,
            seed=request.stream if request.temperature > 0 else None,
            max_tokens=max_new_tokens,
            stop_token_ids=list(end_ids),
            skip_special_tokens=True,
        )
        for request in requests
    ]
    prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    bar = partial(tqdm, leave=False) if shows_progress else False  # goes away when all of these are there
    outputs = vllm.generate(prompts, sampling_params=params, use_tqdm=bar)
    return [_to_completion(tokenizer, list(output.outputs[0].token_ids), end_ids) for output in outputs]


def _to_completion(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], end_ids: Sequence[int]) -> Completion:
    """A completion of its tokens, which other rows' lengths may have padded behind the end."""
    end = next((position for position, token in enumerate(ids) if token in end_ids), None)
    ids = ids if end is None else ids[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(text, len(ids), "length" if end is None else "stop")
