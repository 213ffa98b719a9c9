"""What a trainer would say of its fast paths, before there is one: a trainer on a tiny copy of the model is asked.

The copy is of the model's own class, with random weights, fewer and narrower layers of each of its kinds, and a small
vocabulary; the settings are the run's. So the reasons are the trainer's own, and packed rows are really held against
padded ones. What only the whole model shows (its weights' rounding, a GPU's memory) is not seen by this.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from trl import get_peft_config

from . import compat, script
from .preflight import FastPaths
from .shared_prefix import kernels
from .shared_prefix.mixin import find_obstacle
from .trainer import GRPOExtTrainer


SMALLEST_VOCABULARY, WIDTH, EXPERTS = 512, 128, 4


def tiny_config(config: Any) -> Any:
    """A configuration of the same class, with as many heads for a key head and heads of the same size."""
    small = deepcopy(config)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    num_key_heads = 1 if heads > key_heads else 2
    num_heads = heads // key_heads * num_key_heads
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    num_layers = min(config.num_hidden_layers, max(2, len(kinds)))
    changes: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_heads,
        "hidden_size": num_heads * head_size,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "vocab_size": SMALLEST_VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    if kinds:
        changes["layer_types"] = (kinds * num_layers)[:num_layers]
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None):
            changes[name] = EXPERTS
    if getattr(config, "num_experts_per_tok", None):
        changes["num_experts_per_tok"] = min(2, config.num_experts_per_tok)
    for name, value in changes.items():
        if hasattr(small, name):
            setattr(small, name, value)
    return small


def rehearse(config: Any, tokenizer: Any, training_args: Any, model_args: Any, longest_row: int) -> FastPaths:
    """The fast paths that a trainer takes with these settings, and why it does not take the others.

    Args:
        config (`PreTrainedConfig`):
            The model's configuration.
        tokenizer (`PreTrainedTokenizerBase`):
            Any; which tokens there are does not matter.
        training_args ([`GRPOExtConfig`]):
            The settings. They are not changed.
        model_args (`trl.ModelConfig`):
            How the model is loaded.
        longest_row (`int`):
            Tokens of the longest prompt and completion together.
    """
    with quiet(), compat.generators_restored(torch.device("cpu")), TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(tiny_config(config))
        model.save_pretrained(folder)
        trainer = GRPOExtTrainer(
            model=folder,  # a path, because the reference model is loaded from it again
            reward_funcs=no_reward,
            args=settings_of_rehearsal(training_args, model_args, folder),
            train_dataset=Dataset.from_list([{"prompt": "?"}] * 8),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
        trainer.use_vllm = training_args.use_vllm  # none was started
        trainer.model.train()
        why_padded: str | None = "shared_prefix is 'off'"
        if training_args.shared_prefix != "off":
            why_padded = find_obstacle(whole_model(config, trainer)) or ("" if trainer.packs else trainer.why_padded)
        if not why_padded and not trainer.packs_rows_of(longest_row):
            why_padded = f"a sliding window is shorter than the longest row, of {longest_row} tokens"
        return FastPaths(
            why_padded=why_padded or None,
            why_rows_stay=trainer.why_rows_stay(),
            why_no_reuse=trainer.why_no_reuse(),
            takes_old_policy_forward=compat.takes_old_policy_forward(trainer),
            attention=compat.attention_name(trainer.accelerator.unwrap_model(trainer.model)),
            how_known=f"held against padded ones on a tiny copy ({type(model).__name__})",
            kernel=packed_kernel(config, trainer),
        )


def whole_model(config: Any, trainer: Any) -> Any:
    """The model without weights, with the trainer's attention."""
    name = compat.attention_name(trainer.accelerator.unwrap_model(trainer.model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=name)


def packed_kernel(config: Any, trainer: Any) -> str:
    """How attention over a packed row would be computed, on this device and in the policy's type."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = next(trainer.model.parameters()).dtype
    if trainer.accelerator.mixed_precision in ("bf16", "fp16"):
        dtype = torch.bfloat16 if trainer.accelerator.mixed_precision == "bf16" else torch.float16
    device = trainer.accelerator.device
    if device.type not in kernels.KERNELS:
        return f"a call for each completion ({device.type})"
    obstacle = kernels.why_not(device, dtype, head_size, heads // key_heads)
    return "two calls a layer" if obstacle is None else f"a call for each completion: {obstacle}"


def no_reward(completions: Any, **columns: Any) -> list[float]:
    """A reward for a trainer that does not train."""
    return [0.0] * len(completions)


def settings_of_rehearsal(training_args: Any, model_args: Any, folder: str) -> Any:
    """The run's settings, without what starts something, writes something or compiles."""
    args = copy(training_args)
    changes: dict[str, Any] = {
        "output_dir": str(Path(folder) / "output"),
        "report_to": [],
        "disable_tqdm": True,
        "log_completions": False,
        "record_run": False,
        "log_completions_hub_repo": None,
        "push_to_hub": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "do_eval": False,
        "load_best_model_at_end": False,
        "resume_from_checkpoint": None,
        "reward_weights": None,
        "use_vllm": False,
        "torch_compile": False,
        "use_liger_kernel": False,
        "full_determinism": False,
        "deepspeed": None,
        "chat_template_path": None,
        "shared_prefix": "off" if training_args.shared_prefix == "off" else "auto",
        "model_init_kwargs": script.model_init_kwargs(training_args, model_args),
    }
    for name, value in changes.items():
        if hasattr(args, name):
            setattr(args, name, value)
    args.model_init_kwargs.pop("revision", None)
    return args


@contextmanager
def quiet() -> Iterator[None]:
    """Within it no logger and no bar says anything: what there is to say comes as rows."""
    before, shows_bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if shows_bars:
            transformers_logging.enable_progress_bar()
