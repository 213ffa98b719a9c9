"""How much faster the update is than TRL's: both trainers, the same rollouts, the same gradient.

    python scripts/bench_update.py                                          # all workloads, half an hour
    python scripts/bench_update.py --model smollm2-135m --workloads gsm8k    # a real model's shape
    python scripts/bench_update.py --device cuda --dtype bfloat16 --model qwen2.5-0.5b
    python scripts/bench_update.py --sampler vllm                           # the update as users of vLLM have it

Rollouts are made up beforehand, so that what is timed is the update phase of a generation batch: the old policy's
forward where one is needed, and forward, backward and optimizer step of each pass. `trl.GRPOTrainer` and
`GRPOExtTrainer` take turns in one process. A ratio is only printed if gradient and weights are the same; in bfloat16,
if the error of the gradient, against TRL's in float32, is at most twice TRL's own. Next to it stands the limit: a
plain forward and backward over as many tokens in one row. Peak memory is measured in a process of its own for each
trainer.

On a GPU TRL's trainer also runs with FlashAttention, in each version that is installed: the ratios say which attention
they are against, and the one to quote is against TRL's faster one. The run that measures memory comes first there, in
the same process, and warms up what compiles or is tuned at its first use. A last run, with torch's profiler, says what
share of the GPU's time is attention.

With `--sampler vllm` both trainers have `use_vllm=True` and TRL's defaults for it, among them
`vllm_importance_sampling_correction=True`. vLLM is neither needed nor measured: the rollouts bring log-probabilities
of a sampler that differs a little from the policy (by a normally distributed number, standard deviation
`--sampler_noise` nats a token), and has none for one token in a hundred, as where vLLM says NaN. They are made before
the clock starts, so that the same is timed with either sampler. That includes TRL's forward for the old policy when it
has generated: with several passes it takes one for its ratios, whoever samples, and with a single one only to correct
for vLLM.
"""

import copy
import gc
import json
import logging
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import torch
from datasets import Dataset
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Qwen2Config,
    TrainerCallback,
    set_seed,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils import logging as hf_logging
from trl import GRPOTrainer, TrlParser
from trl.trainer import grpo_trainer

from trl_grpo_ext import GRPOExtConfig, GRPOExtTrainer
from trl_grpo_ext.embedded_policy import embedded_policy_path


# TRL and transformers still use the old names between themselves.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="You are using 'rollout_func'")


@dataclass(frozen=True)
class Workload:
    """Rollouts of `num_prompts` prompts, with lengths in tokens."""

    prompt_tokens: tuple[int, int]
    mean_completion_tokens: float
    longest_completion: int
    num_generations: int
    num_iterations: int
    num_micro_batches: int = 2
    prompts_per_micro_batch: int = 1
    spread: float = 0.6  # of the logarithm of a completion's length
    dead_share: float = 0.0  # of groups whose rewards are all equal

    @property
    def num_prompts(self) -> int:
        return self.num_micro_batches * self.prompts_per_micro_batch

    def completion_tokens(self, numbers: random.Random) -> int:
        """Log-normal, as completions of a policy are; cut off at the longest."""
        length = numbers.lognormvariate(math.log(self.mean_completion_tokens) - self.spread**2 / 2, self.spread)
        return min(self.longest_completion, max(1, round(length)))


WORKLOADS = {
    "gsm8k": Workload((100, 200), 200, 512, num_generations=8, num_iterations=4),
    "half-dead": Workload((100, 200), 200, 512, num_generations=8, num_iterations=4, dead_share=0.5),
    "long-prompt": Workload((2048, 2048), 100, 256, num_generations=16, num_iterations=2, num_micro_batches=1),
    "ragged": Workload((100, 200), 300, 2048, num_generations=8, num_iterations=2, spread=1.0),
}
MODELS: dict[str, PretrainedConfig] = {
    "small": LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Side:
    """What takes turns: a trainer, what it changes in the settings, and the attention of its model."""

    trainer_class: type[GRPOTrainer]
    options: dict[str, Any] = field(default_factory=dict)
    attn_implementation: str = "sdpa"


SIDES: dict[str, Side] = {
    "trl": Side(GRPOTrainer),
    "ours": Side(GRPOExtTrainer, {"shared_prefix": "on"}),
    "ours, no checkpointing": Side(GRPOExtTrainer, {"shared_prefix": "on", "gradient_checkpointing": False}),
}
# On a GPU in place of "trl": the attentions that users of TRL have there. FlashAttention computes in half precision.
TRL_ON_GPUS = {
    "trl, sdpa": Side(GRPOTrainer),
    "trl, flash_attention_2": Side(GRPOTrainer, attn_implementation="flash_attention_2"),
    "trl, flash_attention_3": Side(GRPOTrainer, attn_implementation="flash_attention_3"),
}
# What pays on a GPU alone; it needs several micro-batches in an optimizer step
OURS_ON_GPUS = {
    "ours, fuller micro-batches": Side(GRPOExtTrainer, {"shared_prefix": "on", "tokens_per_micro_batch": "auto"}),
}
# Largest relative difference of gradients and weights in float32; and in bfloat16, where rounding alone makes a
# difference, how many times TRL's error the error of a gradient may be, each against TRL's gradient in float32.
TOLERANCE, ERROR_RATIO = 1e-4, 2.0
# The one of our sides that is quoted. Others are left out where a GPU's memory is too small for them.
QUOTED = "ours"
# Of kernels that compute attention, FlashAttention's, cuDNN's and the memory-efficient ones
ATTENTION_KERNELS = ("flash", "fmha", "sdpa", "attention", "attn")


SAMPLER_MISSING = 0.01  # share of tokens for which the sampler has no log-probability


@dataclass
class BenchArguments:
    """What `bench_update.py` may be asked to change."""

    workloads: list[str] = field(
        default_factory=lambda: list(WORKLOADS), metadata={"help": "What to measure.", "choices": list(WORKLOADS)}
    )
    model: str = field(default="small", metadata={"help": "Shape of the model.", "choices": list(MODELS)})
    device: str = field(default="cpu", metadata={"help": "Where to compute.", "choices": ["cpu", "cuda"]})
    dtype: str = field(
        default="float32", metadata={"help": "Of weights and computation.", "choices": ["float32", "bfloat16"]}
    )
    repeats: int = field(default=3, metadata={"help": "Generation batches of each trainer; the median counts."})
    prompts_per_micro_batch: int = field(
        default=1,
        metadata={
            "help": "Prompts in a micro-batch, with all their completions. On a GPU a single one of a small model "
            "takes as long as its kernels take to be launched, whatever they compute."
        },
    )
    sampler: str = field(
        default="policy",
        metadata={
            "help": "Who has sampled: the policy, or vLLM, which differs a little from it and is corrected for.",
            "choices": ["policy", "vllm"],
        },
    )
    sampler_noise: float = field(
        default=0.01,
        metadata={
            "help": "By how much vLLM's log-probabilities differ: standard deviation in nats a token. From about 0.03 "
            "on TRL's default mode masks some rows, which its trainer computes all the same and ours leaves out."
        },
    )
    beta: float = field(default=0.0, metadata={"help": "KL coefficient; above 0 a reference model takes part."})
    seed: int = field(default=0, metadata={"help": "Seed of rollouts and weights."})
    output_file: Path | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})
    memory_of: str | None = field(
        default=None,
        metadata={
            "help": "Only print the peak memory of one trainer.",
            "choices": [*SIDES, *TRL_ON_GPUS, *OURS_ON_GPUS],
        },
    )

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def workload(self, name: str) -> Workload:
        """A workload by its name, with micro-batches as large as they are asked for."""
        return replace(WORKLOADS[name], prompts_per_micro_batch=self.prompts_per_micro_batch)

    def __post_init__(self) -> None:
        for name in ("repeats", "prompts_per_micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.sampler_noise < math.inf:
            raise ValueError(f"--sampler_noise must be a number of nats, 0 or more, got {self.sampler_noise}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; leave it out to measure on the CPU")


class CannedRollouts:
    """A `rollout_func` whose completions are made up: the same ones for the same seed.

    Args:
        workload (`Workload`):
            How many, and how long.
        vocab_size (`int`), end (`int`):
            Tokens are below the first; each completion ends in the second.
        seed (`int`):
            Seed of lengths and tokens.

    Attributes:
        logprobs (`list[list[float | None]]` or `None`):
            The sampler's, in nats, for each token of each completion; `None` if it is the policy that samples.
    """

    def __init__(self, workload: Workload, vocab_size: int, end: int, seed: int) -> None:
        numbers = random.Random(seed)

        def ids(length: int) -> list[int]:
            return [numbers.randrange(300, vocab_size) for _ in range(length)]

        prompts = [ids(numbers.randint(*workload.prompt_tokens)) for _ in range(workload.num_prompts)]
        self.prompt_ids = [prompt for prompt in prompts for _ in range(workload.num_generations)]
        self.completion_ids = [ids(workload.completion_tokens(numbers) - 1) + [end] for _ in self.prompt_ids]
        self.logprobs: list[list[float | None]] | None = None

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        if len(prompts) != len(self.prompt_ids):
            raise ValueError(f"{len(self.prompt_ids)} rollouts are made up, the trainer wants {len(prompts)}")
        return {"prompt_ids": self.prompt_ids, "completion_ids": self.completion_ids, "logprobs": self.logprobs}


class CannedReward:
    """0 or 1 by turns, and 1 throughout for a share of the prompts."""

    __name__ = "canned_reward"

    def __init__(self, dead_share: float) -> None:
        self.dead_share = dead_share

    def __call__(self, prompts: list[str], **kwargs: Any) -> list[float]:
        distinct = list(dict.fromkeys(prompts))
        dead = set(distinct[: round(self.dead_share * len(distinct))])
        return [1.0 if prompt in dead else float(index % 2) for index, prompt in enumerate(prompts)]


class Stopwatch(TrainerCallback):
    """Seconds of the whole training, and the gradient of its first optimizer step."""

    def __init__(self, on_gpu: bool, keeps_gradient: bool) -> None:
        self.on_gpu, self.keeps_gradient = on_gpu, keeps_gradient
        self.seconds = 0.0
        self.first_gradient: list[torch.Tensor] = []
        self.trainer: GRPOTrainer | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.on_gpu and isinstance(self.trainer, GRPOExtTrainer):
            # Our trainer compares a packed with a padded forward once in a training; there it takes as long as a step.
            assert self.trainer.packs
        self._began = self._now()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.keeps_gradient and not self.first_gradient:
            pause = self._now()
            self.first_gradient = [copied(weight.grad) for weight in model.parameters()]
            self._began += self._now() - pause

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = self._now() - self._began

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


class AttentionShare(TrainerCallback):
    """What share of the time of a GPU's kernels is attention, while it trains."""

    def __init__(self) -> None:
        self.value: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()

    def on_train_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self._profile.stop()
        self.value = share_of_attention(
            (event.key, event.self_device_time_total)
            for event in self._profile.key_averages()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        )


def share_of_attention(kernels: Iterable[tuple[str, float]]) -> float | None:
    """The share of attention in the time of all kernels, which come with their names and times.

    `None` where no kernel was seen: there are machines on which a profiler may not look at a GPU.
    """
    of_attention = total = 0.0
    for name, time_taken in kernels:
        total += time_taken
        if any(part in name.lower() for part in ATTENTION_KERNELS):
            of_attention += time_taken
    return of_attention / total if total else None


@dataclass
class Measured:
    """One update phase."""

    seconds: float
    first_gradient: list[torch.Tensor]
    weights: list[torch.Tensor]
    tokens_computed: list[int]  # of each forward with a gradient


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, whatever becomes of the tensor: several trainers' would be too much for a GPU."""
    return tensor.detach().to("cpu", copy=True)


def sides_of(args: BenchArguments, workload: Workload) -> dict[str, Side]:
    """What takes turns on a device, by name: TRL's trainer, with each attention that is to be had, and then ours."""
    if not args.on_gpu:
        return SIDES
    ours = {**SIDES, **(OURS_ON_GPUS if workload.num_micro_batches > 1 else {})}
    is_half, generation = args.dtype == "bfloat16", torch.cuda.get_device_capability()[0]
    can_be_had = {
        "sdpa": True,
        "flash_attention_2": is_half and generation >= 8 and is_flash_attn_2_available(),
        "flash_attention_3": is_half and generation == 9 and is_flash_attn_3_available(),
    }
    return {
        **{name: side for name, side in TRL_ON_GPUS.items() if can_be_had[side.attn_implementation]},
        **{name: side for name, side in ours.items() if is_ours(name)},
    }


def is_ours(side: str) -> bool:
    return side.startswith("ours")


def limit_of(side: str) -> str:
    """The name of the limit of one of our sides."""
    return side.replace("ours", "limit", 1)


def make_model(args: BenchArguments, attn_implementation: str = "sdpa") -> PreTrainedModel:
    set_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    config = copy.deepcopy(MODELS[args.model])  # trainers write into it
    with torch.device(args.device):  # a GPU draws a billion weights in no time
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)


def make_rollouts(args: BenchArguments, workload: Workload) -> CannedRollouts:
    """The rollouts of a workload, with the sampler's log-probabilities if it is not the policy."""
    vocab_size = MODELS[args.model].vocab_size
    rollouts = CannedRollouts(workload, vocab_size, make_tokenizer().eos_token_id, args.seed)
    if args.sampler == "vllm":
        rollouts.logprobs = sampler_logps(args, rollouts)
    return rollouts


def make_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_policy_path())


def sampler_logps(args: BenchArguments, rollouts: CannedRollouts) -> list[list[float | None]]:
    """The policy's log-probabilities at the start and noise, as another engine has them; `None` where it has none."""
    model = make_model(args).to(args.device).eval()
    numbers = random.Random(args.seed)
    logprobs = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        with torch.no_grad():
            row = torch.tensor([prompt + completion], device=args.device)
            logits = model(row, use_cache=False, logits_to_keep=len(completion) + 1).logits[0, :-1]
            policys = -torch.nn.functional.cross_entropy(logits.float(), row[0, len(prompt) :], reduction="none")
        logprobs.append(
            [
                None if numbers.random() < SAMPLER_MISSING else logp + numbers.gauss(0.0, args.sampler_noise)
                for logp in policys.tolist()
            ]
        )
    return logprobs


class NoEngine:
    """Stands where TRL's trainer has its vLLM: nothing samples with it, and there are no weights to send."""

    def __init__(self, **options: Any) -> None:
        pass

    def sync_weights(self) -> None:
        pass


def run_update(
    args: BenchArguments,
    workload: Workload,
    rollouts: CannedRollouts,
    side: Side,
    *,
    max_steps: int | None = None,
    keeps_copies: bool = False,
    in_float32: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Measured:
    """Train on one generation batch, from the same weights each time.

    Args:
        args (`BenchArguments`), workload (`Workload`), rollouts (`CannedRollouts`), side (`Side`):
            What is trained, on what, and how.
        max_steps (`int`, *optional*):
            Leaves out later passes.
        keeps_copies (`bool`, *optional*, defaults to `False`):
            Keep the first gradient, and the weights that training ends with.
        in_float32 (`bool`, *optional*, defaults to `False`):
            Compute in float32, with the weights that `args.dtype` has.
        callbacks (`Sequence[TrainerCallback]`, *optional*):
            Of the trainer, beside the watch.
    """
    model = make_model(args, side.attn_implementation)
    watch = Stopwatch(args.on_gpu, keeps_copies)
    folder = tempfile.TemporaryDirectory()
    # With a rollout function TRL asks its vLLM for nothing but to take the weights: in this way both trainers correct
    # for one where there is none.
    with folder, patch.object(grpo_trainer, "VLLMGeneration", NoEngine):
        trainer = side.trainer_class(
            model=model.float() if in_float32 else model,
            reward_funcs=CannedReward(workload.dead_share),
            args=GRPOExtConfig(
                **{
                    "output_dir": folder.name,
                    "max_steps": max_steps or workload.num_iterations,
                    "per_device_train_batch_size": workload.num_generations * workload.prompts_per_micro_batch,
                    "gradient_accumulation_steps": workload.num_micro_batches,
                    "num_generations": workload.num_generations,
                    "num_iterations": workload.num_iterations,
                    "max_completion_length": workload.longest_completion,
                    "beta": args.beta,
                    "use_vllm": args.sampler == "vllm",
                    "optim": "sgd",
                    "learning_rate": 1e-3,
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 1e9,
                    "use_cpu": args.device == "cpu",
                    "bf16": False,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": "none",
                    "seed": args.seed,
                    **side.options,
                }
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"prompt {index}" for index in range(64)]}),
            processing_class=make_tokenizer(),
            rollout_func=rollouts,
            callbacks=[watch, *callbacks],
        )
        watch.trainer = trainer
        for shown in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(shown)
        computed: list[int] = []
        trainer.model.register_forward_hook(
            lambda module, positional, named, output: (
                computed.append(named["input_ids"].numel()) if module.training and torch.is_grad_enabled() else None
            ),
            with_kwargs=True,
        )
        trainer.train()
    return Measured(
        seconds=watch.seconds,
        first_gradient=watch.first_gradient,
        weights=[copied(weight) for weight in trainer.model.parameters()] if keeps_copies else [],
        tokens_computed=computed,
    )


def run_limit(args: BenchArguments, tokens_computed: list[int], *, checkpointing: bool) -> float:
    """Seconds of a plain forward and backward over as many tokens, each micro-batch as one dense row."""
    model = make_model(args)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = [torch.randint(300, model.config.vocab_size, (1, tokens)) for tokens in tokens_computed]
    rows = [row.to(args.device) for row in rows]
    options: dict[str, Any] = {}
    if args.on_gpu:  # with all logits of a long row at once the head would cost more than it does in training
        from trl.trainer.utils import add_fused_lm_head  # of TRL 1.15 and later

        add_fused_lm_head(model)
        options["fused_lm_head"] = True
        model(input_ids=rows[0], labels=rows[0], use_cache=False, **options).loss.backward()  # warms up
        torch.cuda.synchronize()
    began = time.perf_counter()
    for row in rows:
        model(input_ids=row, labels=row, use_cache=False, **options).loss.backward()
    if args.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(args: BenchArguments, workload_name: str, side: str) -> float:
    """Peak memory in GB of one trainer: on a CPU in a process of its own."""
    if args.on_gpu:
        return peak_memory_of_gpu(args, workload_name, side)
    command = [sys.executable, __file__, "--workloads", workload_name, "--memory_of", side]
    for name in ("model", "device", "dtype", "prompts_per_micro_batch", "sampler", "sampler_noise", "beta", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.splitlines()[-1])


def peak_memory_of_gpu(args: BenchArguments, workload_name: str, side: str) -> float:
    """What the first pass of one trainer has allocated at most, in GB."""
    gc.collect()  # trainers are circles of references
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    workload = args.workload(workload_name)
    run_update(args, workload, make_rollouts(args, workload), sides_of(args, workload)[side], max_steps=1)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def resident_kb(field_name: str) -> int:
    """What Linux says of this process's memory: `VmRSS` is resident now, `VmHWM` was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field_name}:"))


def print_peak_memory(args: BenchArguments) -> None:
    """In GB, of the first pass: on a CPU what is resident beyond imported libraries, on a GPU what is allocated."""
    side = str(args.memory_of)
    if args.on_gpu:
        print(peak_memory_of_gpu(args, args.workloads[0], side))
        return
    before = resident_kb("VmRSS")
    workload = args.workload(args.workloads[0])
    run_update(args, workload, make_rollouts(args, workload), sides_of(args, workload)[side], max_steps=1)
    print((resident_kb("VmHWM") - before) * 1024 / 1e9)


def relative_difference(
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
    start: list[torch.Tensor] | None = None,
    device: str = "cpu",
) -> float:
    """Norm of the difference over the norm, all tensors taken as one vector; over that of the change since `start`."""
    difference = norm = 0.0
    for index, pair in enumerate(zip(found, expected, strict=True)):
        one, other = (tensor.to(device, torch.float64) for tensor in pair)
        difference += float((one - other).square().sum())
        norm += float((other if start is None else other - start[index].to(other)).square().sum())
    return math.sqrt(difference / norm) if norm else math.inf if difference else 0.0


def differences(
    args: BenchArguments, measured: Measured, expected: Measured, exact_gradient: list[torch.Tensor]
) -> dict[str, float]:
    """How far a trainer's gradient is from TRL's, and from the exact one; without that, how far its change of weights.

    Most of a step of SGD is lost to the rounding of weights in bfloat16, with either trainer: there is nothing to see.
    """
    gradient, found = expected.first_gradient, measured.first_gradient
    result = {"gradient_difference": relative_difference(found, gradient, device=args.device)}
    if exact_gradient:
        result["gradient_error"] = relative_difference(found, exact_gradient, device=args.device)
    else:
        start = [weight.detach() for weight in make_model(args).parameters()]
        change = relative_difference(measured.weights, expected.weights, start, device=args.device)
        result["update_difference"] = change
    return result


def agrees(args: BenchArguments, figures: dict[str, Any], of_trl: dict[str, Any]) -> bool:
    """Whether a trainer computes what TRL's does."""
    if args.dtype == "float32":
        return max(figures["gradient_difference"], figures["update_difference"]) <= TOLERANCE
    return figures["gradient_error"] <= ERROR_RATIO * of_trl["gradient_error"]


def measure(args: BenchArguments, name: str, progress: "tqdm[Any]") -> dict[str, Any]:
    """All figures of a workload."""
    workload = args.workload(name)
    sides = dict(sides_of(args, workload))
    rollouts = make_rollouts(args, workload)
    seconds: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {}
    tokens: dict[str, list[int]] = {}

    def measure_memory() -> None:
        for side in list(sides):
            progress.set_postfix_str(f"{name}: memory of {side}")
            try:
                memory[side] = peak_memory(args, name, side)
            except torch.cuda.OutOfMemoryError:
                if side == QUOTED or not is_ours(side):
                    raise
                del sides[side]
            progress.update()

    if args.on_gpu:
        measure_memory()  # and warm up
    exact_gradient: list[torch.Tensor] = []
    if args.dtype != "float32":
        side = next(iter(sides.values()))
        exact = run_update(args, workload, rollouts, side, max_steps=1, keeps_copies=True, in_float32=True)
        exact_gradient = exact.first_gradient
    ours = [side for side in sides if is_ours(side)]
    expected = None  # what the first side has computed, TRL's
    for repeat in range(1, args.repeats + 1):
        for name_of_side, side in sides.items():
            progress.set_postfix_str(f"{name}: {name_of_side}")
            is_last = repeat == args.repeats
            measured = run_update(args, workload, rollouts, side, keeps_copies=is_last)
            seconds[name_of_side].append(measured.seconds)
            tokens[name_of_side] = measured.tokens_computed
            if is_last:
                expected = expected or measured
                found[name_of_side] = differences(args, measured, expected, exact_gradient)
            gc.collect()
            progress.update()
        for name_of_side in ours:
            checkpointing = sides[name_of_side].options.get("gradient_checkpointing", True)
            limit = run_limit(args, tokens[name_of_side], checkpointing=checkpointing)
            seconds[limit_of(name_of_side)].append(limit)
    if not args.on_gpu:
        measure_memory()
    result: dict[str, Any] = {
        "workload": asdict(workload),
        "trainers": {
            side: {
                "seconds": seconds[side],
                "tokens_computed": sum(tokens[side]),
                "peak_memory_gb": memory[side],
                **found[side],
            }
            for side in sides
        },
        "limit_seconds": {limit_of(side): seconds[limit_of(side)] for side in ours},
    }
    if args.on_gpu:
        share = AttentionShare()
        run_update(args, workload, rollouts, sides[QUOTED], max_steps=1, callbacks=[share])
        result["attention_share"] = share.value
        result["headline"] = headline(args, result)
    return result


def headline(args: BenchArguments, result: dict[str, Any]) -> dict[str, Any]:
    """Our trainer with TRL's settings against TRL's with its fastest attention.

    Returns:
        `dict[str, Any]`:
            `against`, the side of TRL's; `ratio`, its seconds over ours, `None` where the gradients differ;
            `over_the_limit`, our seconds over those of the limit.
    """
    trainers = result["trainers"]
    medians = {side: statistics.median(figures["seconds"]) for side, figures in trainers.items()}
    against = min((side for side in trainers if not is_ours(side)), key=medians.__getitem__)
    is_valid = agrees(args, trainers[QUOTED], next(iter(trainers.values())))
    return {
        "against": against,
        "ratio": medians[against] / medians[QUOTED] if is_valid else None,
        "over_the_limit": medians[QUOTED] / statistics.median(result["limit_seconds"][limit_of(QUOTED)]),
    }


def print_table(args: BenchArguments, results: dict[str, dict[str, Any]]) -> bool:
    """The figures; whether all gradients agree."""
    theirs = [side for side in sides_of(args, args.workload(args.workloads[0])) if not is_ours(side)]
    columns = [
        *("workload", "trainer", "seconds"),
        *([f"ratio to {side}" for side in theirs] if args.on_gpu else ["ratio"]),
        *("over the limit", "tokens", "peak GB", "of TRL's"),
        "gradient" if args.dtype == "float32" else "gradient's error",
    ]
    rows = []
    all_agree = True
    for name, result in results.items():
        trl = result["trainers"][theirs[0]]
        for side, figures in result["trainers"].items():
            seconds = statistics.median(figures["seconds"])
            is_valid = not is_ours(side) or agrees(args, figures, trl)
            all_agree &= is_valid
            limit = result["limit_seconds"].get(limit_of(side))
            rows.append(
                (
                    name if side == theirs[0] else "",
                    side,
                    f"{seconds:.2f}",
                    *(
                        f"{statistics.median(result['trainers'][other]['seconds']) / seconds:.2f}"
                        if is_valid
                        else "gradients differ"
                        for other in theirs
                    ),
                    f"{seconds / statistics.median(limit):.2f}" if limit and is_ours(side) else "",
                    f"{figures['tokens_computed']:,}",
                    f"{figures['peak_memory_gb']:.2f}",
                    f"{figures['peak_memory_gb'] / trl['peak_memory_gb']:.2f}",
                    f"{figures.get('gradient_error', figures['gradient_difference']):.0e}",
                )
            )
    title = f"Update of a generation batch, {args.model}, {args.device}, {args.dtype}, sampler: {args.sampler}"
    show(title, columns, rows)
    for name, result in results.items():
        if args.on_gpu:
            first = result["headline"]
            ratio = "gradients differ" if first["ratio"] is None else f"{first['ratio']:.2f} times as fast"
            share = result["attention_share"]
            of_attention = "unknown" if share is None else f"{share:.0%}"
            print(f"{name}: against {first['against']} {ratio}; attention's share of the GPU's time: {of_attention}")
    return all_agree


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, or without rich its cells; a workload's name begins its rows."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for row in (columns, *rows):
            print("\t".join(row))
        return
    table = Table(*columns, title=title)
    for row in rows:
        if row[0]:
            table.add_section()
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def write_results(args: BenchArguments, results: dict[str, dict[str, Any]]) -> None:
    if args.output_file is None:
        return
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if args.on_gpu else f"{torch.get_num_threads()} threads"
    names = ("model", "dtype", "prompts_per_micro_batch", "sampler", "sampler_noise")
    settings = {name: getattr(args, name) for name in names}
    content = {**settings, "device": device, "workloads": results}
    args.output_file.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str]) -> int:
    (args,) = TrlParser([BenchArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
    if args.memory_of is not None:
        print_peak_memory(args)
        return 0
    results: dict[str, dict[str, Any]] = {}
    too_large = []
    sides = sum(len(sides_of(args, args.workload(name))) for name in args.workloads)
    with tqdm(total=sides * (args.repeats + 1), unit="run") as progress:
        for name in args.workloads:
            try:
                results[name] = measure(args, name, progress)
            except torch.cuda.OutOfMemoryError:
                too_large.append(name)
            write_results(args, results)  # what is there by now stays, whatever becomes of the others
    all_agree = print_table(args, results)
    if not all_agree:
        print("error: the gradients differ, so there is nothing to compare", file=sys.stderr)
    if too_large:
        names = ", ".join(too_large)
        print(f"error: {names}: too large for the memory of this GPU; choose a smaller --model", file=sys.stderr)
    return 0 if all_agree and not too_large else 1


if __name__ == "__main__":
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("trl_grpo_ext").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
