"""How often a policy answers right: greedily and when it samples, with its tags and without them.

Format is easily mistaken for reasoning: a policy that learns to close its tags gains strict accuracy without solving
one more problem. So two figures stand side by side. *Strict* accuracy asks for the right answer inside a closed answer
tag, *flexible* accuracy takes the last number of the text. And greedy accuracy overstates what was learned, because it
jumps when the most frequent way of solving a problem changes; the accuracy of samples shows how much of the
distribution moved.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.models import unwrap_model_for_generation

from .. import compat
from ..rewards.correctness import is_reference_number
from ..rewards.extract import extract_last_number, extract_tagged_answer
from ..rewards.references import reference_to_text
from ..shared_prefix.probe import undisturbed


if TYPE_CHECKING:
    from datasets import Dataset
    from trl.generation.vllm_generation import VLLMGeneration


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, each from 0 to 1.

    Args:
        strict (`float`):
            Greedy decoding, the answer inside a closed answer tag.
        flexible (`float`):
            Greedy decoding, the last number of the text.
        sampled (`float` or `None`):
            Mean strict accuracy of samples at temperature 1.0; `None` if none were drawn.
        items (`int`):
            Number of problems.
        samples_per_item (`int`):
            Number of samples drawn for each problem.
    """

    strict: float
    flexible: float
    sampled: float | None
    items: int
    samples_per_item: int


def is_strictly_correct(text: str, answer: Any) -> bool:
    """Whether the text's closed answer tag holds the answer, character for character or as the same number."""
    tagged, reference = extract_tagged_answer(text), reference_to_text(answer)
    if tagged is None or reference is None:
        return False
    return tagged == reference or is_reference_number(tagged, reference)


def is_flexibly_correct(text: str, answer: Any) -> bool:
    """Whether the last number in the text is the answer."""
    reference = reference_to_text(answer)
    return reference is not None and is_reference_number(extract_last_number(text), reference)


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    num_samples: int = 1,
    batch_size: int = 64,
    progress: "tqdm[Any] | None" = None,
) -> list[list[str]]:
    """Complete prompts with `model.generate`.

    Args:
        model (`PreTrainedModel`):
            The policy, in whatever mode; its own generation defaults (top-k, repetition penalty) are not used.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template if prompts are conversational.
        prompts (`Sequence[str | list[dict]]`):
            Prompts as TRL takes them: texts, which are completed as they are, or messages.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; 0.0 decodes greedily.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions for each prompt.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions that are generated at once.
        progress (`tqdm`, *optional*):
            A bar to advance by one for each prompt.

    Returns:
        `list[list[str]]`:
            For each prompt its `num_samples` completions, special tokens left out.

    Raises:
        ValueError: If prompts are conversational and the tokenizer has no chat template.
    """
    ids_of_prompts = [_to_ids(tokenizer, prompt) for prompt in prompts]
    end_ids = model.generation_config.eos_token_id or []
    end_ids = {*(end_ids if isinstance(end_ids, list) else [end_ids]), tokenizer.eos_token_id} - {None}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad_id = 0 if pad_id is None else pad_id  # whichever: it is masked
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    config = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        num_return_sequences=num_samples,
        eos_token_id=sorted(end_ids),
        pad_token_id=pad_id,
        disable_compile=True,
    )
    texts: list[list[str]] = [[] for _ in prompts]
    # Longest first: what does not fit into memory shows at once, and a batch's rows are of about one length.
    order = sorted(range(len(prompts)), key=lambda index: -len(ids_of_prompts[index]))
    rows = max(1, batch_size // num_samples)
    for start in range(0, len(order), rows):
        indices = order[start : start + rows]
        rows_ids = [torch.tensor(ids_of_prompts[index], device=model.device) for index in indices]
        inputs = {
            "input_ids": pad_sequence(rows_ids, batch_first=True, padding_value=pad_id, padding_side="left"),
            "attention_mask": pad_sequence(
                [torch.ones_like(ids) for ids in rows_ids], batch_first=True, padding_side="left"
            ),
        }
        with torch.no_grad():
            outputs = model.generate(**inputs, generation_config=config)
        completions = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for position, index in enumerate(indices):
            texts[index] = completions[position * num_samples : (position + 1) * num_samples]
        if progress is not None:
            progress.update(len(indices))
    return texts


def _texts_from_vllm(
    vllm: "VLLMGeneration",
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int,
    temperature: float,
    num_samples: int,
    progress: "tqdm[Any]",
) -> list[list[str]]:
    """[`generate_texts`] with a trainer's vLLM, all prompts at once; its settings are as before afterwards."""
    ids_of_prompts = [_to_ids(tokenizer, prompt) for prompt in prompts]
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
    try:
        repeated = [ids for ids in ids_of_prompts for _ in range(num_samples)]
        completion_ids = vllm.generate(repeated, images=None, num_generations=num_samples)[1]
    finally:
        vars(vllm).update(before)
    progress.update(len(prompts))
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return [completions[start : start + num_samples] for start in range(0, len(completions), num_samples)]


def _to_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """A prompt's tokens, as TRL makes them."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are messages and the tokenizer has no chat template: set tokenizer.chat_template, or make "
            "the prompts texts"
        )
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"]


def _bring_to(device: torch.device, model: nn.Module) -> None:
    """Move a model to the processes' device, if it is not there: DeepSpeed does so only when training begins."""
    if next(model.parameters()).device.type != device.type:
        model.to(device)


def check_problems(dataset: "Dataset") -> None:
    """Raise `ValueError` unless a data set has problems, each with a prompt and an answer to compare with."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "column_names"):
        raise ValueError(f"problems must be a datasets.Dataset, whose length is known, not a {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("there are no problems to evaluate on; ask for at least one")
    for column in ("prompt", "answer"):
        if column not in dataset.column_names:
            raise ValueError(
                f"problems need the columns 'prompt' and 'answer', and these have {', '.join(dataset.column_names)}: "
                f"rename the one that holds the {column}"
            )
    for index, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(f"problem {index} has no prompt: {str(prompt)[:60]!r} is neither a text nor messages")
    for index, answer in enumerate(dataset["answer"]):
        if reference_to_text(answer) is None:
            raise ValueError(
                f"problem {index} has no answer to compare with: 'answer' is {str(answer)[:60]!r}, and must be a text "
                "or a number; leave the problem out"
            )


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: "Dataset",
    *,
    max_new_tokens: int,
    samples_per_item: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    vllm: "VLLMGeneration | None" = None,
    description: str | None = "Evaluating",
) -> Accuracy:
    """Measure a policy's accuracy on problems with the columns `prompt` and `answer`.

    Args:
        model (`nn.Module`):
            The policy, as the trainer holds it: wrapped, and shared out over processes, if `accelerator` is given.
            Its mode and the state of the random number generators are as before afterwards.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template if prompts are conversational.
        dataset (`datasets.Dataset`):
            The problems: texts or messages in `prompt`, and in `answer` what [`reference_to_text`] understands.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        samples_per_item (`int`, *optional*, defaults to `4`):
            Samples at temperature 1.0 for each problem; 0 leaves the sampled accuracy out.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions that are generated at once, on each process. vLLM makes its batches itself.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        accelerator (`Accelerator`, *optional*):
            Where there are several processes: each takes its share of the problems, and all return the same figures.
            Weights that are shared out are gathered for that time.
        vllm (`VLLMGeneration`, *optional*):
            The `vllm_generation` of a trainer with `use_vllm=True`: it is brought the policy's weights, and generates
            in place of the policy. A server's samples do not depend on `seed`. TRL merges a LoRA adapter for that and
            takes it out again, which leaves rounding in the weights, as it does whenever training generates.
        description (`str` or `None`, *optional*, defaults to `"Evaluating"`):
            Label of the progress bar; `None` shows none.

    Returns:
        `Accuracy`:
            The shares of right answers.

    Raises:
        ValueError: If there is no problem to evaluate on, a column is missing, or a problem has no answer. Nothing is
            generated before that is known.
    """
    check_problems(dataset)
    process_index = accelerator.process_index if accelerator is not None else 0
    num_processes = accelerator.num_processes if accelerator is not None else 1
    # Each process takes as many problems, the last ones twice if need be: where weights are shared out, all processes
    # must generate equally often.
    indices = range(process_index, len(dataset), num_processes)
    share = dataset.select([*indices, *[len(dataset) - 1] * (-(-len(dataset) // num_processes) - len(indices))])
    prompts, answers = list(share["prompt"]), list(share["answer"])[: len(indices)]
    runs = [(0.0, 1)] + ([(1.0, samples_per_item)] if samples_per_item else [])
    if accelerator is not None and not compat.holds_parts_of_parameters(model):
        _bring_to(accelerator.device, model)
    seed_offset = process_index
    if vllm is not None:
        seed_offset //= vllm.tensor_parallel_size  # processes that share a copy of the model share its samples
        with torch.no_grad():
            vllm.sync_weights()  # training does it when it next generates
    generates_itself = vllm is None and accelerator is not None
    unwrapped = unwrap_model_for_generation(model, accelerator) if generates_itself else nullcontext(model)
    with (
        unwrapped as policy,
        undisturbed(policy, next(policy.parameters()).device),  # training goes on as if there had been no evaluation
        tqdm(
            total=len(share) * len(runs),
            desc=description,
            unit="problem",
            disable=process_index != 0 or description is None,
        ) as progress,
    ):
        set_seed(seed + seed_offset)
        if vllm is not None:
            generate = partial(_texts_from_vllm, vllm)
        else:
            generate = partial(generate_texts, policy, batch_size=batch_size)
        texts = [
            generate(
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                num_samples=num_samples,
                progress=progress,
            )
            for temperature, num_samples in runs
        ]
    strict, flexible, sampled = [], [], []
    for index, answer in enumerate(answers):
        strict.append(is_strictly_correct(texts[0][index][0], answer))
        flexible.append(is_flexibly_correct(texts[0][index][0], answer))
        if samples_per_item:
            sampled += [is_strictly_correct(text, answer) for text in texts[1][index]]
    if num_processes > 1:
        strict, flexible, sampled = gather_object(strict), gather_object(flexible), gather_object(sampled)
    return Accuracy(
        strict=sum(strict) / len(strict),
        flexible=sum(flexible) / len(flexible),
        sampled=sum(sampled) / len(sampled) if sampled else None,
        items=len(strict),
        samples_per_item=samples_per_item,
    )
