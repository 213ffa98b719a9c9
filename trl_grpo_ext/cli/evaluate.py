"""`trl-grpo-ext evaluate`: let a model answer a data set's questions, and keep and grade the answers."""

import json
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import OneLineParser
from ..exits import one_line, stop
from ..screen import show
from ..script_arguments import ColumnArguments
from ._files import write_json


if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLE = """
trl-grpo-ext evaluate --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k --samples_per_item 4
trl-grpo-ext evaluate --model_name_or_path outputs/run/checkpoint-100 --dataset_name test.csv --answer_column solution
accelerate launch --num_processes 8 -m trl_grpo_ext evaluate --model_name_or_path ... --dataset_name ...
"""

# Arguments of vllm.LLM that have an option here
OPTIONS_OF_VLLM = {
    "model": "model_name_or_path",
    "revision": "model_revision",
    **{
        name: name for name in ("dtype", "seed", "trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization")
    },
}
# Those on which answers depend no more than on the size of a batch, so that an evaluation may go on with others
OF_SPEED = (
    *("enforce_eager", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "swap_space"),
    *("cpu_offload_gb", "enable_prefix_caching", "enable_chunked_prefill", "disable_log_stats", "compilation_config"),
)


@dataclass(kw_only=True)
class EvaluateArguments(ColumnArguments):
    """What is evaluated, on what, and how."""

    model_name_or_path: str = field(
        metadata={
            "help": "A model's name on the hub, 'embedded', or a folder: a model, a LoRA adapter, a trainer's "
            "checkpoint (also DeepSpeed's and FSDP's shards), or a run's output folder."
        }
    )
    dataset_name: str = field(
        metadata={
            "help": "The problems: 'gsm8k', 'math', 'svamp' or 'asdiv'; another data set's name on the hub; a folder, "
            "or a JSON Lines, JSON, CSV or parquet file; 'arithmetic' is made from the seed."
        }
    )
    split: str = field(default="test", metadata={"help": "Split on the hub or in the folder; a file is taken whole."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set on the hub."})
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System message before each question; 'none' leaves it out. Default: asks for our tags."},
    )
    prompt_example: bool = field(
        default=False, metadata={"help": "Show a worked example before each question, in the format asked for."}
    )
    prompt_format: str = field(
        default="chat",
        metadata={
            "help": "'chat': messages, in the model's chat template; 'text': their texts alone, for a model that has "
            "none.",
            "choices": ["chat", "text"],
        },
    )
    items: int | None = field(default=None, metadata={"help": "The first so many problems. Default: all."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer, in tokens."})
    samples_per_item: int = field(
        default=0,
        metadata={
            "help": "Samples of each problem beside the greedy answer, for mean@n, pass@k and maj@k. Default: none."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "The samples' temperature."})
    batch_size: int = field(
        default=32, metadata={"help": "Answers generated at once on each process; vLLM sees to that itself."}
    )
    seed: int = field(default=0, metadata={"help": "Of the samples."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "What the model is loaded in; 'auto': what it was saved in. Default: float32 on a CPU, else auto.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    backend: str = field(
        default="transformers", metadata={"help": "What generates.", "choices": ["transformers", "vllm"]}
    )
    tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that vLLM shares the model out over."})
    gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of a GPU's memory that vLLM takes."})
    vllm_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of vllm.LLM, as a JSON object: "
            '\'{"enforce_eager": true, "max_num_seqs": 64, "quantization": "fp8"}\'.'
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Transformers' name of an attention."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where answers.jsonl and figures.json go. Default: evaluations/MODEL-DATASET. What answers are "
            "there already is not generated again."
        },
    )

    def __post_init__(self) -> None:
        for name in ("items", "max_new_tokens", "batch_size", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.samples_per_item < 0:
            raise ValueError(f"--samples_per_item must not be negative, got {self.samples_per_item}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if self.output_dir and Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise ValueError(f"--output_dir: {self.output_dir!r} is no folder")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature must be a number above 0, got {self.temperature}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"--gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        self._check_backend()

    @property
    def for_vllm(self) -> dict[str, Any]:
        """Further arguments of `vllm.LLM`."""
        return self.vllm_kwargs if isinstance(self.vllm_kwargs, dict) else {}

    def _check_backend(self) -> None:
        """Refuse what the backend would ignore, and make an object of `vllm_kwargs`."""
        if isinstance(self.vllm_kwargs, str):
            try:
                self.vllm_kwargs = json.loads(self.vllm_kwargs)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"--vllm_kwargs must be a JSON object, got {self.vllm_kwargs!r}: {error}") from None
        if self.backend == "vllm":
            if self.attn_implementation is not None:
                raise ValueError("--attn_implementation is for --backend transformers; vLLM chooses its own")
            for name in self.for_vllm:
                if name in OPTIONS_OF_VLLM:
                    raise ValueError(f"--vllm_kwargs: {name!r} has an option of its own, --{OPTIONS_OF_VLLM[name]}")
            return
        for name in ("vllm_kwargs", "tensor_parallel_size", "gpu_memory_utilization"):
            default = next(item.default for item in fields(self) if item.name == name)
            if getattr(self, name) != default:
                raise ValueError(f"--{name} is for vLLM, which --backend vllm asks for; got --backend {self.backend}")


def main(arguments: list[str]) -> None:
    parser = OneLineParser(
        [EvaluateArguments],
        prog="trl-grpo-ext evaluate",
        description="Let a model answer a data set's questions; keep and grade the answers. Called again, it goes on.",
        example=EXAMPLE,
    )
    (args,) = parser.parse_or_stop(arguments)
    if args.backend == "vllm" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stop(2, "--backend vllm shares a model out itself: start one process, with --tensor_parallel_size")
    from ..ranks import run_as_rank

    run_as_rank(_evaluate, args)


def default_output_dir(model: str, dataset: str) -> str:
    """A folder that names both, without what is no part of a file's name."""
    parts = [part for part in model.split("/") if part not in ("", ".", "..", "~")]
    is_checkpoint = len(parts) > 1 and re.fullmatch(r"checkpoint-\d+", parts[-1])
    names = ["-".join(parts[-2:]) if is_checkpoint else (parts or ["model"])[-1], Path(dataset).name or "data"]
    return str(Path("evaluations", re.sub(r"[^\w.-]+", "-", "-".join(names)).strip(".-")))


def _evaluate(args: EvaluateArguments) -> None:
    from transformers.utils import logging as transformers_logging

    from ..evaluation import evaluate, table_of
    from ..evaluation.policies import PolicyError, fingerprint, locate

    transformers_logging.disable_progress_bar()  # of loading the model
    accelerator = _accelerator()
    is_main = accelerator is None or accelerator.is_main_process
    problems = _load_problems(args)
    output_dir = Path(args.output_dir or default_output_dir(args.model_name_or_path, args.dataset_name))
    dtype = args.dtype or ("float32" if _device(accelerator).type == "cpu" else "auto")
    try:
        place = locate(args.model_name_or_path)
        if is_main and place.startswith(f"{args.model_name_or_path.rstrip('/')}/"):
            print(f"note: {args.model_name_or_path} has no model yet: taking {Path(place).name}", file=sys.stderr)
        settings: dict[str, Any] = {
            "model": args.model_name_or_path,
            **({"revision": args.model_revision} if args.model_revision else {}),
            **({"weights": fingerprint(place)} if Path(place).is_dir() else {}),
        }
        if args.backend == "vllm":
            generator = _start_vllm(args, place, dtype, problems)
            settings["dtype"] = dtype
            further = {name: value for name, value in args.for_vllm.items() if name not in OF_SPEED}
            if further:
                settings["vllm_kwargs"] = further
        else:
            generator = _load_model(args, place, dtype, _device(accelerator))
        evaluation = evaluate(
            dataset=problems,
            max_new_tokens=args.max_new_tokens,
            samples_per_item=args.samples_per_item,
            temperature=args.temperature,
            batch_size=args.batch_size,
            seed=args.seed,
            accelerator=accelerator,
            answers_file=output_dir / "answers.jsonl",
            settings=settings,
            **generator,
        )
    except (PolicyError, ValueError, OSError) as error:
        stop(1, error)
    if not is_main:
        return
    write_json(str(output_dir / "figures.json"), evaluation.figures.to_dict())
    show(lambda: table_of({args.model_name_or_path: evaluation.figures}))
    on_disk = len(evaluation.answers) - evaluation.generated
    print(
        f"{evaluation.generated} answers generated"
        + (f", {on_disk} were on disk already" if on_disk else "")
        + f"; answers and figures are in {output_dir}"
    )


def _accelerator() -> Any:
    """Among several processes, what they talk through. Each holds a whole model, whatever they were launched for."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.pop(name, None) is not None and os.environ.get("RANK") == "0":
            print("note: each process loads the whole model; DeepSpeed and FSDP are not used", file=sys.stderr)
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.num_processes != int(os.environ["WORLD_SIZE"]):  # they would all write one file
        stop(
            1,
            f"{os.environ['WORLD_SIZE']} processes were launched, which accelerate does not bring together: start one",
        )
    return accelerator


def _device(accelerator: Any) -> Any:
    if accelerator is not None:
        return accelerator.device
    from accelerate import PartialState

    return PartialState().device


def _load_problems(args: EvaluateArguments) -> "Dataset":
    from ..tasks import load_problems, system_prompt_named

    try:
        problems = load_problems(
            args.dataset_name,
            split=args.split,
            config=args.config_name,
            **args.columns,
            system_prompt=system_prompt_named(args.system_prompt),
            with_example=args.prompt_example,
            max_rows=args.items,
            seed=args.seed,
        )
    except (OSError, ValueError) as error:
        stop(1, f"data set {args.dataset_name!r} cannot be loaded. Cause: {error}")
    if "id" in problems.column_names and len(set(problems["id"])) < len(problems):
        problems = problems.remove_columns("id")  # of several files: the row's number tells them apart
    if args.prompt_format == "text":
        problems = problems.map(_to_text)
    return problems


def _to_text(row: dict[str, Any]) -> dict[str, str]:
    """A prompt's messages as a text, in their order."""
    return {"prompt": "\n\n".join(message["content"] for message in row["prompt"])}


def _load_model(args: EvaluateArguments, place: str, dtype: str, device: Any) -> dict[str, Any]:
    from ..evaluation.policies import load_policy

    policy = load_policy(
        place,
        dtype=dtype,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
        attn_implementation=args.attn_implementation,
        device=device,
    )
    return {"model": policy.model, "tokenizer": policy.tokenizer}


def _start_vllm(args: EvaluateArguments, place: str, dtype: str, problems: "Dataset") -> dict[str, Any]:
    """vLLM with the model; what is no whole model is put together in a folder of its own first."""
    import tempfile

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
    except ImportError as error:
        stop(1, f"--backend vllm: vLLM is not installed ({error}): pip install vllm, or --backend transformers")
    from ..evaluation.generate import end_ids_of, to_ids
    from ..evaluation.policies import generation_config_of, is_whole_model, load_policy, load_tokenizer, save_whole

    options: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    with tempfile.TemporaryDirectory(prefix="model-") as scratch:
        if not is_whole_model(place, args.model_revision):
            place = save_whole(load_policy(place, dtype=dtype, **options), scratch)
            options["revision"] = None
        tokenizer = load_tokenizer(place, **options)
        longest = max(len(to_ids(tokenizer, prompt)) for prompt in problems["prompt"])
        options |= {"max_model_len": longest + args.max_new_tokens, **args.for_vllm}
        try:
            llm = LLM(
                model=place,
                dtype=dtype,
                tensor_parallel_size=args.tensor_parallel_size,
                gpu_memory_utilization=args.gpu_memory_utilization,
                seed=args.seed,
                **options,
            )
        except Exception as error:  # what vLLM raises has no type in common, and the cause may be in what it printed
            cause = one_line(error) or type(error).__name__
            stop(
                1,
                f"vLLM cannot start: {cause[:500]} (--vllm_kwargs reaches vLLM's settings, or --backend transformers)",
            )
        end_ids = end_ids_of(tokenizer, generation_config_of(place, args.model_revision))
    return {"model": None, "tokenizer": tokenizer, "vllm": llm, "end_ids": end_ids}
