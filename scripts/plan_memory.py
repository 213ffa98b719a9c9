"""What GRPO needs of a GPU's memory, by launch configuration and number of GPUs; no weights needed.

    python scripts/plan_memory.py                                        # Qwen2.5, 0.5B to 32B, on 1 to 64 GPUs
    python scripts/plan_memory.py --models path/or/name --gpus 8 --lora_rank 32

What is counted is said in `trl_grpo_ext/memory.py`. DeepSpeed's buffers, the allocator's waste and CUDA itself are the
`--reserve_gb`. For one run with its settings on this machine: `trl-grpo-ext doctor --config run.yaml`.
"""

import sys
from dataclasses import dataclass, field

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

from rich.console import Console
from rich.table import Table
from trl import TrlParser

from trl_grpo_ext.memory import (
    CONFIGURATIONS,
    GB,
    RESERVE_GB,
    SHAPES,
    ModelSize,
    Workload,
    load_config,
    model_size,
    model_states,
    plan,
)


__all__ = ["load_config", "main", "model_size", "model_states", "plan"]


@dataclass
class PlanArguments:
    """What `plan_memory.py` may be asked."""

    models: list[str] = field(
        default_factory=lambda: list(SHAPES),
        metadata={"help": f"Of {', '.join(SHAPES)}; or the folder, or the name on the hub, of a model's config."},
    )
    gpus: list[int] = field(default_factory=lambda: [1, 8, 16, 64], metadata={"help": "Numbers of GPUs."})
    gpus_per_node: int = field(default=8, metadata={"help": "Share a node's CPU memory, and a copy in fsdp2_hybrid."})
    lora_rank: int = field(
        default=0, metadata={"help": "Train adapters of this rank on all linear layers (0: all weights)."}
    )
    gpu_gb: float = field(default=80.0, metadata={"help": "Memory of a GPU."})
    reserve_gb: float = field(default=RESERVE_GB, metadata={"help": "Of it, for buffers, waste and CUDA."})
    rows: int = field(default=8, metadata={"help": "Completions of a micro-batch."})
    prompt_tokens: int = field(default=256, metadata={"help": "Tokens of a prompt."})
    completion_tokens: int = field(default=512, metadata={"help": "Tokens of a completion."})
    vllm: bool = field(default=False, metadata={"help": "vLLM generates, on GPUs of its own."})

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "rows", "prompt_tokens", "completion_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if min(self.gpus) < 1:
            raise ValueError(f"--gpus must be at least 1, got {min(self.gpus)}")
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank must not be negative, got {self.lora_rank}")

    @property
    def workload(self) -> Workload:
        return Workload(self.rows, self.prompt_tokens, self.completion_tokens, self.vllm, self.gpus_per_node)


def print_plan(args: PlanArguments, name: str, size: ModelSize) -> None:
    trained = f"LoRA of rank {args.lora_rank}, {size.trained / 1e6:,.0f} M" if args.lora_rank else "all"
    table = Table(
        "configuration",
        *(f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}" for num_gpus in args.gpus),
        "CPU, a node",
        title=f"{name}: {size.parameters / 1e9:.2f} B parameters, trained: {trained}. GB a GPU at its peak (states)",
    )
    for configuration in CONFIGURATIONS:
        memories = [plan(size, configuration, num_gpus, args.workload) for num_gpus in args.gpus]
        cells = [
            f"{memory.peak / GB:,.0f} ({memory.states / GB:,.0f})"
            if memory.peak / GB + args.reserve_gb <= args.gpu_gb
            else f"[dim]{memory.peak / GB:,.0f} ({memory.states / GB:,.0f}) too much[/dim]"
            for memory in memories
        ]
        table.add_row(configuration, *cells, f"{max(memory.cpu for memory in memories) / GB:,.0f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(argv: list[str]) -> int:
    try:
        (args,) = TrlParser([PlanArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
        for name in args.models:
            print_plan(args, name, model_size(load_config(name), args.lora_rank))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
