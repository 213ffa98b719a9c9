"""What GRPO needs of a GPU's memory, by launch configuration and number of GPUs; no weights needed.

Counts, for each GPU: what training holds of the model (weights and gradients in bf16, weights and Adam's two moments
in fp32, shared out as ZeRO says), and on top of it the largest of three that come one after the other: forward and
backward of a micro-batch with gradient checkpointing, generation without vLLM, and the optimizer step. What training
holds is tested against DeepSpeed; the rest is an estimate. DeepSpeed's buffers, the allocator's waste and CUDA itself
are a reserve that comes on top, [`RESERVE_GB`].
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config


GB = 1e9
# The shapes that the Qwen2.5 models publish: hidden, MLP, layers, heads, key heads, vocabulary, tied embeddings.
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False),
}
# Launch configurations: ZeRO stage, and whether optimizer and weights are kept in the CPU's memory.
CONFIGURATIONS = {
    "ddp": (0, False, False),
    "zero1": (1, False, False),
    "zero2": (2, False, False),
    "zero3": (3, False, False),
    "zero2_offload": (2, True, False),
    "zero3_offload": (3, True, True),
    "fsdp2_hybrid": (3, False, False),
}
# Those that share out over the GPUs of a node, so that each node holds a whole copy.
WITHIN_A_NODE = ("fsdp2_hybrid",)
RESERVE_GB = 6.0  # of a GPU, for buffers, waste and CUDA


@dataclass(frozen=True)
class Workload:
    """What is computed at once on a GPU.

    Args:
        rows (`int`, *optional*, defaults to `8`):
            Completions of a micro-batch.
        prompt_tokens (`int`, *optional*, defaults to `256`), completion_tokens (`int`, *optional*, defaults to `512`):
            Tokens of a prompt, and of a completion.
        vllm (`bool`, *optional*, defaults to `False`):
            vLLM generates, and its memory is counted elsewhere.
        gpus_per_node (`int`, *optional*, defaults to `8`):
            They share the CPU's memory of a node, with offload, and a copy of the model with `fsdp2_hybrid`.
        keeps_reference (`bool`, *optional*, defaults to `False`):
            There is a reference model beside the policy.
    """

    rows: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 512
    vllm: bool = False
    gpus_per_node: int = 8
    keeps_reference: bool = False


@dataclass(frozen=True)
class ModelSize:
    """What the plan needs to know of a model.

    Args:
        parameters (`int`):
            All of them, tied ones once.
        trained (`int`):
            Those that are trained: all, or the adapters'.
        largest_layer (`int`):
            Parameters of the layer that has most.
        config (`Any`):
            The model's configuration.
    """

    parameters: int
    trained: int
    largest_layer: int
    config: Any


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU, and bytes of a node's CPU memory."""

    states: float
    update: float
    generation: float
    optimizer_step: float
    cpu: float

    @property
    def peak(self) -> float:
        return self.states + max(self.update, self.generation, self.optimizer_step)


def load_config(name: str) -> Any:
    """A model's configuration: one of the shapes that are known here, of a folder, or from the hub."""
    if name in SHAPES:
        hidden, mlp, layers, heads, key_heads, vocabulary, tied = SHAPES[name]
        return Qwen2Config(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        message = f"there is no config of {name!r}; name a folder with a config.json, or one of {', '.join(SHAPES)}"
        raise ValueError(message) from error


def model_size(config: Any, lora_rank: int = 0) -> ModelSize:
    """Count parameters on the meta device, which holds none."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]
    adapters = lora_rank * sum(module.in_features + module.out_features for module in linear)
    largest = max(
        sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
    )
    return ModelSize(parameters, adapters if lora_rank else parameters, largest, config)


def model_states(size: ModelSize, stage: int, num_gpus: int) -> float:
    """Bytes that a GPU holds of a model in training between two micro-batches, in bf16 with Adam.

    ZeRO (https://huggingface.co/papers/1910.02054), figure 1. Of a trained parameter there are 2 bytes of the weight,
    2 of its gradient, and 12 of the optimizer: weight and two moments in fp32. Stage 1 shares out the 12, stage 2 the
    gradients as well, stage 3 the weights too, also those that are not trained. Without ZeRO accelerate keeps weights
    and gradients in fp32: 16 bytes. DeepSpeed's own estimators count 4 more in each GPU's share, for the gradients in
    fp32 that are there in the optimizer step alone.
    """
    frozen = 2 * (size.parameters - size.trained)
    if stage == 0:
        return frozen + 16 * size.trained
    weights, gradients, optimizer = frozen + 2 * size.trained, 2 * size.trained, 12 * size.trained
    shared_out = optimizer + (gradients if stage >= 2 else 0) + (weights if stage >= 3 else 0)
    return weights + gradients + optimizer - shared_out + shared_out / num_gpus


def plan(size: ModelSize, configuration: str, num_gpus: int, workload: Workload) -> Memory:
    """What a GPU needs, and what a node needs of the CPU's memory."""
    stage, offloads_optimizer, offloads_weights = CONFIGURATIONS[configuration]
    if configuration in WITHIN_A_NODE:
        num_gpus = min(num_gpus, workload.gpus_per_node)
    config = size.config
    weights, share = 2 * size.parameters, size.trained / num_gpus
    states, cpu = model_states(size, stage, num_gpus), 0.0
    if workload.keeps_reference:  # as the policy is loaded: in fp32 without ZeRO
        states += 4 * size.parameters if stage == 0 else weights / (num_gpus if stage == 3 else 1)
    num_local = min(num_gpus, workload.gpus_per_node)
    if offloads_optimizer:
        states -= 14 * share  # with the optimizer goes the gradient's share
        cpu += 16 * share * num_local  # 12, and the gradient in fp32
    if offloads_weights:
        states -= weights / num_gpus
        cpu += weights / num_gpus * num_local
    tokens = workload.rows * (workload.prompt_tokens + workload.completion_tokens)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # bf16: the input of each layer; and within one, recomputed, about 8 states of the hidden size and 4 of the MLP's
    activations = 2 * tokens * (layers * hidden + 8 * hidden + 4 * config.intermediate_size)
    logits = 3 * 4 * 1024 * config.vocab_size  # fp32, of a chunk of tokens, their softmax and their gradient
    gathered = 2 * 2 * size.largest_layer if stage == 3 else 0  # the weights of this layer and the next
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    cache = 2 * 2 * tokens * layers * config.num_key_value_heads * head_size
    return Memory(
        states=states,
        update=activations + logits + gathered,
        generation=0.0 if workload.vllm else cache + (weights if stage == 3 else 0),
        optimizer_step=0.0 if offloads_optimizer or stage == 0 else 4 * share,
        cpu=cpu,
    )
