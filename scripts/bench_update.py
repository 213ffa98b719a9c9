"""How much faster the update is than TRL's: both trainers, the same rollouts, the same gradient.

    python scripts/bench_update.py                                          # all workloads, half an hour
    python scripts/bench_update.py --model smollm2-135m --workloads gsm8k    # a real model's shape
    python scripts/bench_update.py --device cuda --dtype bfloat16 --model qwen2.5-0.5b
    python scripts/bench_update.py --sampler vllm                           # the update as users of vLLM have it

Rollouts are made up beforehand, so that what is timed is the update phase of a generation batch: the old policy's
forward where one is needed, and forward, backward and optimizer step of each pass. `trl.GRPOTrainer` and
`GRPOExtTrainer` take turns in one process. A ratio is only printed if gradient and weights are the same. Next to it
stands the limit: a plain forward and backward over as many tokens in one row. Peak memory is measured in a process of
its own for each trainer.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
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
    num_prompts: int = 2  # a micro-batch each
    spread: float = 0.6  # of the logarithm of a completion's length
    dead_share: float = 0.0  # of groups whose rewards are all equal

    def completion_tokens(self, numbers: random.Random) -> int:
        """Log-normal, as completions of a policy are; cut off at the longest."""
        length = numbers.lognormvariate(math.log(self.mean_completion_tokens) - self.spread**2 / 2, self.spread)
        return min(self.longest_completion, max(1, round(length)))


WORKLOADS = {
    "gsm8k": Workload((100, 200), 200, 512, num_generations=8, num_iterations=4),
    "half-dead": Workload((100, 200), 200, 512, num_generations=8, num_iterations=4, dead_share=0.5),
    "long-prompt": Workload((2048, 2048), 100, 256, num_generations=16, num_iterations=2, num_prompts=1),
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
# What takes turns: a trainer, and what it changes in the settings.
SIDES: dict[str, tuple[type[GRPOTrainer], dict[str, Any]]] = {
    "trl": (GRPOTrainer, {}),
    "ours": (GRPOExtTrainer, {"shared_prefix": "on"}),
    "ours, no checkpointing": (GRPOExtTrainer, {"shared_prefix": "on", "gradient_checkpointing": False}),
}


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
        default=None, metadata={"help": "Only print the peak memory of one trainer.", "choices": list(SIDES)}
    )

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")
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

    def __init__(self, device: str, keeps_gradient: bool) -> None:
        self.device, self.keeps_gradient = device, keeps_gradient
        self.seconds = 0.0
        self.first_gradient: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = self._now()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.keeps_gradient and not self.first_gradient:
            pause = self._now()
            self.first_gradient = [weight.grad.double().cpu() for weight in model.parameters()]
            self._began += self._now() - pause

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = self._now() - self._began

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class Measured:
    """One update phase."""

    seconds: float
    first_gradient: list[torch.Tensor]
    weights: list[torch.Tensor]
    tokens_computed: list[int]  # of each forward with a gradient


def make_model(args: BenchArguments) -> PreTrainedModel:
    set_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    config = copy.deepcopy(MODELS[args.model])  # trainers write into it
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


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
    side: str,
    folder: str,
    *,
    max_steps: int | None = None,
    keeps_copies: bool = True,
) -> Measured:
    """Train on one generation batch, from the same weights each time; `max_steps` leaves out later passes."""
    trainer_class, options = SIDES[side]
    watch = Stopwatch(args.device, keeps_copies)
    # With a rollout function TRL asks its vLLM for nothing but to take the weights: in this way both trainers correct
    # for one where there is none.
    with patch.object(grpo_trainer, "VLLMGeneration", NoEngine):
        trainer = trainer_class(
            model=make_model(args),
            reward_funcs=CannedReward(workload.dead_share),
            args=GRPOExtConfig(
                **{
                    "output_dir": folder,
                    "max_steps": max_steps or workload.num_iterations,
                    "per_device_train_batch_size": workload.num_generations,
                    "gradient_accumulation_steps": workload.num_prompts,
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
                    **options,
                }
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"prompt {index}" for index in range(64)]}),
            processing_class=make_tokenizer(),
            rollout_func=rollouts,
            callbacks=[watch],
        )
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
        weights=[weight.detach().double().cpu() for weight in trainer.model.parameters()] if keeps_copies else [],
        tokens_computed=computed,
    )


def run_limit(args: BenchArguments, measured: Measured, *, checkpointing: bool) -> float:
    """Seconds of a plain forward and backward over as many tokens, each micro-batch as one dense row."""
    model = make_model(args).to(args.device)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = [torch.randint(300, model.config.vocab_size, (1, tokens)) for tokens in measured.tokens_computed]
    began = time.perf_counter()
    for row in rows:
        row = row.to(args.device)
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(args: BenchArguments, workload_name: str, side: str) -> float:
    """Peak memory in GB of one trainer, in a process of its own."""
    command = [sys.executable, __file__, "--workloads", workload_name, "--memory_of", side]
    for name in ("model", "device", "dtype", "sampler", "sampler_noise", "beta", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.splitlines()[-1])


def resident_kb(field_name: str) -> int:
    """What Linux says of this process's memory: `VmRSS` is resident now, `VmHWM` was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field_name}:"))


def print_peak_memory(args: BenchArguments) -> None:
    """In GB, of the first pass: on a CPU what is resident beyond imported libraries, on a GPU what is allocated."""
    before = resident_kb("VmRSS")
    workload = WORKLOADS[args.workloads[0]]
    rollouts = make_rollouts(args, workload)
    with tempfile.TemporaryDirectory() as folder:
        run_update(args, workload, rollouts, str(args.memory_of), folder, max_steps=1, keeps_copies=False)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e9)
    else:
        print((resident_kb("VmHWM") - before) * 1024 / 1e9)


def relative_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, all tensors taken as one vector."""
    difference = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True)))
    return difference / math.sqrt(sum(float(b.square().sum()) for b in expected))


def measure(args: BenchArguments, name: str, progress: "tqdm[Any]") -> dict[str, Any]:
    """All figures of a workload."""
    workload = WORKLOADS[name]
    rollouts = make_rollouts(args, workload)
    seconds: dict[str, list[float]] = {side: [] for side in (*SIDES, "limit", "limit, no checkpointing")}
    last: dict[str, Measured] = {}
    for _ in range(args.repeats):
        for side in SIDES:
            progress.set_postfix_str(f"{name}: {side}")
            with tempfile.TemporaryDirectory() as folder:
                last[side] = run_update(args, workload, rollouts, side, folder)
            seconds[side].append(last[side].seconds)
            gc.collect()
            progress.update()
        for side, checkpointing in (("limit", True), ("limit, no checkpointing", False)):
            seconds[side].append(run_limit(args, last["ours"], checkpointing=checkpointing))
    start = [weight.detach().double() for weight in make_model(args).parameters()]
    expected_change = [end - begin for end, begin in zip(last["trl"].weights, start, strict=True)]
    result: dict[str, Any] = {"workload": asdict(workload), "trainers": {}}
    for side, measured in last.items():
        change = [end - begin for end, begin in zip(measured.weights, start, strict=True)]
        progress.set_postfix_str(f"{name}: memory of {side}")
        result["trainers"][side] = {
            "seconds": seconds[side],
            "tokens_computed": sum(measured.tokens_computed),
            "peak_memory_gb": peak_memory(args, name, side),
            "gradient_difference": relative_difference(measured.first_gradient, last["trl"].first_gradient),
            "update_difference": relative_difference(change, expected_change),
        }
        progress.update()
    result["limit_seconds"] = {side: seconds[side] for side in ("limit", "limit, no checkpointing")}
    return result


def print_table(args: BenchArguments, results: dict[str, dict[str, Any]]) -> bool:
    """The figures; whether all gradients agree."""
    tolerance = 1e-4 if args.dtype == "float32" else 5e-2
    table = Table(
        *("workload", "trainer", "seconds", "ratio", "over the limit", "tokens", "peak GB", "of TRL's", "gradient"),
        title=f"Update of a generation batch, {args.model}, {args.device}, {args.dtype}, sampler: {args.sampler}",
    )
    all_agree = True
    for name, result in results.items():
        table.add_section()
        trl = result["trainers"]["trl"]
        for side, figures in result["trainers"].items():
            seconds = statistics.median(figures["seconds"])
            limit = "limit, no checkpointing" if "no checkpointing" in side else "limit"
            agrees = max(figures["gradient_difference"], figures["update_difference"]) <= tolerance
            all_agree &= agrees
            table.add_row(
                name if side == "trl" else "",
                side,
                f"{seconds:.2f}",
                f"{statistics.median(trl['seconds']) / seconds:.2f}" if agrees else "gradients differ",
                "" if side == "trl" else f"{seconds / statistics.median(result['limit_seconds'][limit]):.2f}",
                f"{figures['tokens_computed']:,}",
                f"{figures['peak_memory_gb']:.2f}",
                f"{figures['peak_memory_gb'] / trl['peak_memory_gb']:.2f}",
                f"{figures['gradient_difference']:.0e}",
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return all_agree


def main(argv: list[str]) -> int:
    (args,) = TrlParser([BenchArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
    if args.memory_of is not None:
        print_peak_memory(args)
        return 0
    results = {}
    with tqdm(total=len(args.workloads) * len(SIDES) * (args.repeats + 1), unit="run") as progress:
        for name in args.workloads:
            results[name] = measure(args, name, progress)
    all_agree = print_table(args, results)
    if args.output_file is not None:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
        settings = {name: getattr(args, name) for name in ("model", "dtype", "sampler", "sampler_noise")}
        content = {**settings, "device": device, "workloads": results}
        args.output_file.write_text(json.dumps(content, indent=1) + "\n")
    if not all_agree:
        print("error: the gradients differ, so there is nothing to compare", file=sys.stderr)
    return 0 if all_agree else 1


if __name__ == "__main__":
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("trl_grpo_ext").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
