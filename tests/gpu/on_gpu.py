"""What tests on a GPU have in common: marks, models, rows, and what packed rows are held against.

They import nothing that a checkout with unpacked wheels may lack: `scripts/check_gpu.sh` runs them there.
"""

import os
import shutil

import pytest
import torch
from canned import canned_config, canned_prompts, canned_reward, relative_difference
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer


DEVICE = torch.device("cuda")
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here"),
]
# Triton has the host's part of its kernels compiled.
NEEDS_COMPILER = pytest.mark.skipif(
    not any(shutil.which(os.environ.get("CC", name)) for name in ("gcc", "clang")),
    reason="torch.compile needs gcc or clang, and neither is installed",
)
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Of both trainers: in which class, and with which options
TRL, OURS = (GRPOTrainer, GRPOConfig, {}), (GRPOExtTrainer, GRPOExtConfig, {"shared_prefix": "on"})


def has_flash_attention() -> bool:
    """Whether the card is one for which torch has FlashAttention."""
    return torch.cuda.get_device_capability(DEVICE) >= (8, 0)


def make_model(dtype=torch.float32, head_size=64, attn_implementation="sdpa", seed=0):
    """A Llama of two layers, four heads and two key heads for `tiny_tokenizer`, with logits that differ."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_size,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=258,
        pad_token_id=256,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model.to(dtype)


def save_policy(folder) -> str:
    """A checkpoint of `make_model` and `tiny_tokenizer`; returns its path."""
    make_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def config_of(folder, config_class, **options):
    return canned_config(folder, config_class, use_cpu=False, **options)


def make_trainer(classes, model, folder, **options):
    trainer_class, config_class, settings = classes
    return trainer_class(
        model=model,
        reward_funcs=canned_reward,
        args=config_of(folder, config_class, **settings, **options),
        train_dataset=canned_prompts(),
        processing_class=tiny_tokenizer(),
    )


def make_rows(rows, seed=0):
    """Rows by prompt, tokens of the prompt and of the completion, as TRL lays them out: ids, mask, width."""
    numbers = torch.Generator().manual_seed(seed)
    prompt_width, width = max(row[1] for row in rows) + 1, max(row[2] for row in rows) + 1
    prompts = torch.randint(0, 256, (1 + max(row[0] for row in rows), prompt_width), generator=numbers)
    ids = torch.full((len(rows), prompt_width + width), 256)
    mask = torch.zeros_like(ids)
    for index, (prompt, length, completion) in enumerate(rows):
        places = slice(prompt_width - length, prompt_width + completion)
        answer = torch.randint(0, 256, (completion,), generator=numbers)
        ids[index, places] = torch.cat([prompts[prompt, :length], answer])
        mask[index, places] = 1
    return ids.to(DEVICE), mask.to(DEVICE), width


def logps_by_row(model, ids, mask, width):
    """The oracle: each row by itself, without padding, through the plain forward; `(B, C)`."""
    rows = []
    for tokens, is_token in zip(ids, mask.bool(), strict=True):
        length = int(is_token[-width:].sum())
        row = tokens[is_token]
        logps = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
        places = torch.arange(len(row) - length - 1, len(row) - 1, device=row.device)
        found = logps[places, row[len(row) - length :]]
        rows.append(torch.cat([found, found.new_zeros(width - length)]))
    return torch.stack(rows)


def logps_and_gradient(model, logps):
    """Log-probabilities and the gradient of a sum in which each has a weight of its own, in fp64."""
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1)).to(logps.device)
    model.zero_grad()
    (weights * logps).sum().backward()
    gradient = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
    return logps.detach().double(), gradient


def of_trainer(trainer, ids, mask, width):
    """What a trainer computes for rows, in fp64."""
    trainer.model.train()
    logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
    return logps_and_gradient(trainer.model, logps)


def errors(found, exact):
    """Relative to the norm of what is exact, for each of several tensors."""
    return [((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]


def assert_no_worse(found, padded, exact, factor=2.0):
    """No error is more than so many times that of a padded computation in the same precision."""
    of_packed, of_padded = errors(found, exact), errors(padded, exact)
    assert min(of_padded) > 0
    for error, bound in zip(of_packed, of_padded, strict=True):
        assert error <= factor * bound, (of_packed, of_padded)


__all__ = [
    *("DEVICE", "HALF", "NEEDS_COMPILER", "ON_GPU", "OURS", "TRL", "assert_no_worse", "config_of", "errors"),
    "has_flash_attention",
    *("logps_and_gradient", "logps_by_row", "make_model", "make_rows", "make_trainer", "of_trainer", "save_policy"),
    "relative_difference",
]
