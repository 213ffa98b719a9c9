"""What one asks before a run, as rows: `trl-grpo-ext doctor` prints them.

Each check is a function that is given what it needs to know, and returns rows, [`Check`]. Nothing here asks a network,
and nothing starts a process; importing this module imports no torch.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .exits import Stop, one_line
from .passes import can_shorten, window_within_pass


if TYPE_CHECKING:
    from .memory import ModelSize, Workload

GB = 1e9
OK: Literal["ok"] = "ok"
NOTE: Literal["note"] = "note"
PROBLEM: Literal["problem"] = "problem"


@dataclass(frozen=True)
class Check:
    """A row: what was looked at, and what was found.

    Args:
        name (`str`):
            What was looked at.
        status (`str`):
            `"ok"`, `"note"` (it works, and there is something to know) or `"problem"` (the run would not start, or not
            be what was meant).
        found (`str`):
            What was found.
        remedy (`str`, *optional*):
            What to do.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""


Sections = dict[str, list[Check]]


def guarded(name: str, check: Callable[..., Iterable[Check]], *args: Any, **kwargs: Any) -> list[Check]:
    """The rows of a check; what it raises is a row too, and ends no other check."""
    try:
        return list(check(*args, **kwargs))
    except Stop as stopped:
        return [Check(name, PROBLEM, stopped.line.removeprefix("error: "))]
    except Exception as error:  # of any package, model or data set
        return [Check(name, PROBLEM, f"not checked: {type(error).__name__}: {one_line(error)[:300]}")]


# Versions

# Which transformers and torch go with a vLLM.
VLLM_COMPANIONS = (
    ("==0.31.*", {"transformers": ">=5.10.4,<5.18", "torch": "==2.13.*"}),
    (">=0.29,<0.31", {"transformers": ">=5.10.4", "torch": "==2.13.*"}),
    (">=0.27,<0.29", {"transformers": ">=5.9", "torch": "==2.13.*"}),
    (">=0.22,<0.27", {"transformers": ">=5.9", "torch": "==2.11.*"}),
)
TRL_TAKES_VLLM = ">=0.22,<0.32"
# What is reported beside the packages that this one requires.
OPTIONAL = ("deepspeed", "vllm", "flash-attn", "math-verify", "matplotlib", "tensorboard", "wandb", "trackio")


def names_of_training(requirements: Sequence[str]) -> list[str]:
    """The packages without which nothing can be trained: those of the core and of the extra `train`."""
    parsed = [Requirement(text) for text in requirements]
    return [item.name for item in parsed if item.marker is None or item.marker.evaluate({"extra": "train"})]


def check_versions(
    requirements: Sequence[str],
    installed: Mapping[str, str | None],
    tested: Mapping[str, str] | None = None,
    wanted: Iterable[str] = (),
) -> list[Check]:
    """Packages against the ranges of this package's own metadata, and against the set that is tested.

    Args:
        requirements (`Sequence[str]`):
            As `importlib.metadata.requires` gives them.
        installed (`Mapping[str, str | None]`):
            The installed version of each package that is looked at; `None` where there is none.
        tested (`Mapping[str, str]`, *optional*):
            The tested versions, of `constraints.txt`.
        wanted (`Iterable[str]`, *optional*):
            Optional packages that the settings ask for.
    """
    parsed = [Requirement(text) for text in requirements]
    ranges = {item.name: item for item in parsed if item.url is None and item.specifier}
    required = set(names_of_training(requirements))
    rows, fine, missing = [], [], []
    for name, version in installed.items():
        if version is None:
            if name in required or name in wanted:
                wants = str(ranges[name].specifier) if name in ranges else TRL_TAKES_VLLM if name == "vllm" else ""
                rows.append(Check(name, PROBLEM, "is not installed", f'pip install "{name}{wants}"'))
            else:
                missing.append(name)
        elif name in ranges and not _is_in(version, str(ranges[name].specifier)):
            wants = str(ranges[name].specifier)
            rows.append(Check(name, PROBLEM, f"{version}, and {wants} is needed", f'pip install "{name}{wants}"'))
        else:
            fine.append(f"{name} {version}")
    if fine:
        rows.insert(0, Check("packages", OK, ", ".join(fine)))
    if missing:
        rows.append(Check("not installed", OK, f"{', '.join(missing)}: optional"))
    others = [
        f"{name} {version} ({tested[name]})"
        for name, version in installed.items()
        if tested and version is not None and name in tested and _public(version) != tested[name]
    ]
    if others:
        found = f"other versions than the tested ones (in brackets): {', '.join(others)}"
        rows.append(Check("tested set", NOTE, found, "pip install -c constraints.txt gives the tested set"))
    elif tested:
        rows.append(Check("tested set", OK, "what is installed of constraints.txt has its versions"))
    return rows + check_vllm_companions(installed)


def check_vllm_companions(installed: Mapping[str, str | None]) -> list[Check]:
    """Whether the installed vLLM is one that TRL takes, beside its transformers and torch."""
    version = installed.get("vllm")
    if version is None:
        return []
    companions = next((others for versions, others in VLLM_COMPANIONS if _is_in(version, versions)), None)
    if companions is None:
        found = f"{version}, and TRL takes {TRL_TAKES_VLLM}"
        return [Check("vllm", PROBLEM, found, f'pip install "vllm{TRL_TAKES_VLLM}"')]
    wrong = [
        f"{name} {installed.get(name)}, and it wants {wants}"
        for name, wants in companions.items()
        if not _is_in(installed.get(name) or "0", wants)
    ]
    if not wrong:
        return [Check("vllm", OK, f"{version} goes with this transformers and torch")]
    wants = " ".join(f'"{name}{versions}"' for name, versions in companions.items())
    return [Check("vllm", PROBLEM, f"{version} with {'; '.join(wrong)}", f"pip install {wants}")]


def _is_in(version: str, specifier: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(_public(version)), prereleases=True)
    except InvalidVersion:
        return True  # somebody's own build


def _public(version: str) -> str:
    """Without what a build calls itself: `2.13.0` of `2.13.0+cu130`."""
    return version.partition("+")[0]


def read_constraints(text: str) -> dict[str, str]:
    """Versions by package, of a file with lines such as `torch==2.13.0`."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", text, flags=re.MULTILINE))


# Machine


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in GB, compute capability."""

    name: str
    total_gb: float
    free_gb: float
    capability: str = ""
    has_bf16: bool = True


@dataclass(frozen=True)
class Machine:
    """What a run finds: cores, memory and free space in GB, GPUs.

    Args:
        cores (`int`):
            Cores that this process may use.
        memory_gb (`float`), available_gb (`float`):
            The memory, and how much of it is free.
        gpus (`tuple[Gpu, ...]`):
            The GPUs that torch sees.
        disk_gb (`float`, *optional*):
            Free space where the run writes.
        hidden_gpus (`bool`, *optional*, defaults to `False`):
            There is a driver for GPUs, and torch sees none.
        is_planned (`bool`, *optional*, defaults to `False`):
            The GPUs are another machine's.
        is_offline (`bool`, *optional*, defaults to `False`):
            The environment forbids asking the hub.
    """

    cores: int
    memory_gb: float
    available_gb: float
    gpus: tuple[Gpu, ...] = ()
    disk_gb: float | None = None
    hidden_gpus: bool = False
    is_planned: bool = False
    is_offline: bool = False

    @property
    def gpu_gb(self) -> float | None:
        """Memory of the smallest GPU."""
        return min((gpu.total_gb for gpu in self.gpus), default=None)


def check_machine(machine: Machine, args: Any = None) -> list[Check]:
    """Cores, memory and GPUs; and with the settings, whether they can be kept on them."""
    rows = [
        Check(
            "CPU",
            OK,
            f"{machine.cores} cores, {machine.memory_gb:.0f} GB of memory, {machine.available_gb:.0f} of them free",
        )
    ]
    for gpu, indices in _grouped(machine.gpus).items():
        found = f"{len(indices)} x {gpu.name}, {gpu.total_gb:.0f} GB, {gpu.free_gb:.0f} of them free"
        if gpu.capability:
            found += f", compute capability {gpu.capability}"
        if machine.is_planned:
            found = f"planned for: GPUs of {gpu.total_gb:.0f} GB (--gpu_gb), in place of this machine's"
        is_full = gpu.free_gb < 0.8 * gpu.total_gb
        remedy = "another process holds memory on it: nvidia-smi names it" if is_full else ""
        rows.append(Check("GPU", NOTE if is_full else OK, found, remedy))
        if args is not None and args.wants_bf16 and not gpu.has_bf16:
            rows.append(Check("bf16", PROBLEM, f"{gpu.name} computes no bf16", "--bf16 false, or --fp16 true"))
    if not machine.gpus:
        rows.append(_without_gpus(machine, args))
    if machine.disk_gb is not None:
        is_little = machine.disk_gb < 2
        remedy = "checkpoints hold weights and optimizer: another --output_dir, or --save_only_model true"
        rows.append(
            Check("disk", NOTE if is_little else OK, f"{machine.disk_gb:.0f} GB free", remedy if is_little else "")
        )
    if machine.is_offline:
        rows.append(Check("hub", OK, "offline: the environment forbids asking it (HF_HUB_OFFLINE)"))
    return rows


def _without_gpus(machine: Machine, args: Any) -> Check:
    if machine.hidden_gpus:
        remedy = "install a torch built for this driver's CUDA, or look at CUDA_VISIBLE_DEVICES"
        return Check("GPU", NOTE, "there is a driver, and torch sees no GPU", remedy)
    if args is None or not args.wants_gpu:
        return Check("GPU", OK, "none" if args is None else "none, and none is asked for (use_cpu)")
    remedy = "--use_cpu true for a run on the CPU; to ask for another machine: --gpu_gb 80 --num_processes 8"
    if args.wants_bf16:
        return Check("GPU", PROBLEM, "none, and bf16 wants one: the run would not start here", remedy)
    return Check("GPU", NOTE, "none: the run would be on the CPU", remedy)


def _grouped(gpus: Iterable[Gpu]) -> dict[Gpu, list[int]]:
    groups: dict[Gpu, list[int]] = {}
    for index, gpu in enumerate(gpus):
        groups.setdefault(gpu, []).append(index)
    return groups


# Launch


@dataclass(frozen=True)
class Launch:
    """How processes are started.

    Args:
        num_processes (`int`):
            Number of processes.
        configuration (`str`):
            One of [`trl_grpo_ext.memory.CONFIGURATIONS`].
        name (`str`):
            What it is called.
        uses_deepspeed (`bool`, *optional*, defaults to `False`):
            Whether DeepSpeed shares the model out.
    """

    num_processes: int = 1
    configuration: str = "ddp"
    name: str = "one process"
    uses_deepspeed: bool = False


def check_launch(launch: Launch, machine: Machine, has_compiler: bool, has_ninja: bool) -> list[Check]:
    """Number of processes against GPUs, and what DeepSpeed compiles with."""
    plural = "es" if launch.num_processes > 1 else ""
    found = f"{launch.num_processes} process{plural}, {launch.name}"
    rows = [Check("launch", OK, found)]
    if machine.gpus and not machine.is_planned and launch.num_processes > len(machine.gpus):
        found += f", and {len(machine.gpus)} GPUs here"
        rows = [Check("launch", NOTE, found, "right on several nodes; else lower --num_processes")]
    lacking = [name for name, there in (("a C++ compiler", has_compiler), ("ninja", has_ninja)) if not there]
    if launch.uses_deepspeed and lacking:
        found = f"it compiles parts of itself, and there is no {' and no '.join(lacking)}"
        rows.append(Check("DeepSpeed", PROBLEM, found, "pip install ninja; apt install g++, or load a module with it"))
    return rows


# Batches and settings


def check_batches(args: Any, num_processes: int, num_prompts: int | None) -> list[Check]:
    """What a generation, a step and the run consist of, in completions.

    Args:
        args ([`GRPOExtConfig`]):
            The settings.
        num_processes (`int`):
            Number of processes.
        num_prompts (`int`, *optional*):
            Rows of the training data, where they are known.
    """
    size, steps, passes = args.per_device_train_batch_size, args.steps_per_generation, args.num_iterations
    accumulation = args.gradient_accumulation_steps
    per_process = size * steps
    groups = per_process * num_processes // args.num_generations
    updates = steps * passes / accumulation
    rows = [
        Check(
            "generation",
            OK,
            f"{_count(groups, 'prompt')} x {args.num_generations} completions = {per_process * num_processes}"
            + (f", {per_process} on each of {num_processes} processes" if num_processes > 1 else ""),
        ),
        Check(
            "optimizer step",
            OK,
            f"{size * accumulation * num_processes} completions: {accumulation} x {size}"
            + (f" on {num_processes} processes" if num_processes > 1 else ""),
        ),
        Check(
            "passes",
            OK,
            f"{passes} over each generation, {_count(updates, 'optimizer step')} a generation",
        ),
    ]
    if updates < 1:
        rows[-1] = Check(
            "passes",
            NOTE,
            f"an optimizer step takes {_count(1 / updates, 'generation')} of completions",
            "usual is one step a generation or more: a smaller gradient_accumulation_steps",
        )
    if window_within_pass(steps, accumulation) is None:
        rows.append(
            Check(
                "schedule",
                NOTE,
                f"steps_per_generation {steps} and gradient_accumulation_steps {accumulation}: optimizer steps begin "
                "in the middle of passes, so no rows are left out and none dealt out",
                "make one of them a multiple of the other",
            )
        )
    return rows + _check_length(args, num_prompts, groups, updates)


def _check_length(args: Any, num_prompts: int | None, groups: int, updates: float) -> list[Check]:
    """Steps and generations of the run, and whether the data is enough for one of them."""
    if num_prompts is not None and num_prompts < groups:
        found = f"{num_prompts} prompts, and a single generation takes {groups}"
        return [Check("run", PROBLEM, found, "more data, or fewer completions at once")]
    in_epoch = None if num_prompts is None else int(num_prompts // groups * updates)
    steps = args.max_steps
    if steps <= 0:
        if in_epoch is None:
            return [Check("run", OK, f"{_count(args.num_train_epochs, 'epoch')} of unknown length")]
        steps = math.ceil(args.num_train_epochs * in_epoch)
    generations = math.ceil(steps / updates)
    found = f"{_count(steps, 'optimizer step')}, {_count(generations, 'generation')}"
    found += f", {generations * groups * args.num_generations:,} completions"
    if in_epoch:
        found += f"; {_count(in_epoch, 'step')} an epoch, {steps / in_epoch:.2g} epochs"
    rows = [Check("run", OK, found)]
    if args.save_strategy == "steps" and args.save_steps > steps:
        found = f"save_steps {args.save_steps:g}, and the run has {steps}: none before its end"
        rows.append(Check("checkpoints", NOTE, found, "a smaller --save_steps"))
    return rows


def _count(number: float, what: str) -> str:
    return f"{number:,.4g} {what}{'' if number == 1 else 's'}" if number < 1000 else f"{number:,.0f} {what}s"


# Models with fewer parameters than this take, and need, higher rates.
SMALL_MODEL = 5e7
USUAL_RATES = {"full": (1e-7, 2e-5), "full, small": (1e-6, 1e-3), "LoRA": (1e-6, 5e-4)}


def check_settings_of_learning(args: Any, num_parameters: int | None, uses_lora: bool) -> list[Check]:
    """Numbers that are legal, and far from what is usual."""
    rows = []
    is_small = num_parameters is not None and num_parameters < SMALL_MODEL
    low, high = USUAL_RATES["LoRA" if uses_lora else "full, small" if is_small else "full"]
    rate = args.learning_rate
    found = f"{rate:g}, {'of adapters' if uses_lora else 'of all weights'}, {_plain(args.lr_scheduler_type)}"
    if not low <= rate <= high:
        found += f"; usual is {low:g} to {high:g}" + (" for a model this small" if is_small else "")
        remedy = "too high loses the format within ten steps, too low learns nothing: begin within that range"
        rows.append(Check("learning rate", NOTE, found, remedy))
    else:
        rows.append(Check("learning rate", OK, found))
    is_usual = 0.5 <= args.temperature <= 1.3
    remedy = "" if is_usual else "1.0 samples from the policy itself; groups need answers that differ"
    rows.append(Check("temperature", OK if is_usual else NOTE, f"{args.temperature:g}", remedy))
    if args.num_generations < 4:
        found = f"{args.num_generations} completions a group: few groups have both right and wrong answers"
        rows.append(Check("group", NOTE, found, "--num_generations 8 is usual"))
    rows.append(Check("seed", OK, f"{args.seed}"))
    target_kl = getattr(args, "target_kl", None)
    if target_kl is not None:
        shortens = can_shorten(args.num_iterations, args.steps_per_generation, args.gradient_accumulation_steps)
        found = f"{target_kl:g} nats a token" + ("" if shortens else ": of these passes there is nothing to end")
        remedy = "" if shortens else "leave it out, or more num_iterations"
        rows.append(Check("target_kl", OK if shortens else NOTE, found, remedy))
    return rows


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


# Fast paths


@dataclass(frozen=True)
class FastPaths:
    """What a trainer has said of its fast paths; of each a reason where it does not take it.

    Args:
        why_padded (`str`, *optional*):
            Why rows are not packed.
        why_rows_stay (`str`, *optional*):
            Why rows stay in their micro-batches.
        why_no_reuse (`str`, *optional*):
            Why the old policy takes a forward of its own.
        takes_old_policy_forward (`bool`):
            Whether TRL would compute the old policy's log-probabilities by itself.
        attention (`str`):
            The attention implementation.
        how_known (`str`):
            What was looked at.
        kernel (`str`, *optional*):
            How attention over a packed row is computed.
    """

    why_padded: str | None
    why_rows_stay: str | None
    why_no_reuse: str | None
    takes_old_policy_forward: bool
    attention: str
    how_known: str
    kernel: str | None = None


def check_fast_paths(paths: FastPaths, args: Any) -> list[Check]:
    """What the settings and the model get of what makes an update cheaper, and why not."""
    setting = getattr(args, "shared_prefix", "auto")
    remedies = {
        "attn_implementation": "--attn_implementation sdpa",
        "shared_prefix": "--shared_prefix auto",
        "NEFTune": "leave --neftune_noise_alpha out",
    }
    remedy = next((text for word, text in remedies.items() if word in (paths.why_padded or "")), "")
    found = f"yes: each prompt once for all its completions, no padding; {paths.how_known}"
    if paths.why_padded is not None:
        found = f"no: {paths.why_padded}. Prompts are computed once for each completion"
    unwanted = paths.why_padded is not None and setting == "on"
    status = PROBLEM if unwanted else OK if paths.why_padded is None else NOTE
    rows = [Check("packed rows", status, found, remedy), Check("attention", OK, paths.attention)]
    if paths.kernel is not None and paths.why_padded is None:
        rows.append(Check("packed attention", OK, paths.kernel))
    rows.append(_check_reuse(paths, args))
    rows.append(_check_skipped_rows(paths, args))
    by_prompt = paths.why_rows_stay is None and paths.why_padded is None
    found = "rows of a prompt come into the same micro-batch" if by_prompt else "no: rows stay where TRL shuffles them"
    rows.append(Check("dealt out by prompt", OK if by_prompt else NOTE, found))
    tokens = getattr(args, "tokens_per_micro_batch", None)
    if tokens is not None:
        moves = paths.why_rows_stay is None
        found = f"at most {tokens} tokens a micro-batch" if moves else f"does nothing: {paths.why_rows_stay}"
        rows.append(Check("fuller micro-batches", OK if moves else NOTE, found))
    return rows


def _check_reuse(paths: FastPaths, args: Any) -> Check:
    name = "old policy"
    if not paths.takes_old_policy_forward:
        return Check(name, OK, "needs no forward of its own: a single step is made on each generation")
    if paths.why_no_reuse is not None:
        remedy = "--reuse_first_pass_logps true" if "reuse_first_pass_logps" in paths.why_no_reuse else ""
        found = f"a forward of its own over each generation: {paths.why_no_reuse}"
        return Check(name, NOTE, found, remedy)
    updates = args.steps_per_generation / args.gradient_accumulation_steps
    if window_within_pass(args.steps_per_generation, args.gradient_accumulation_steps) is None:
        found = "log-probabilities of the first pass up to the first optimizer step, a forward for what follows it"
        return Check(name, OK, found)
    if updates <= 1:
        return Check(name, OK, "its log-probabilities are those of the first pass: no forward of their own")
    found = f"log-probabilities of the first pass for 1 of {updates:g} optimizer steps, a forward for the others"
    return Check(name, OK, found)


def _check_skipped_rows(paths: FastPaths, args: Any) -> Check:
    name = "rows without gradient"
    if not getattr(args, "skip_zero_advantage", True):
        return Check(name, NOTE, "computed too: skip_zero_advantage is False", "--skip_zero_advantage true")
    if args.beta != 0.0:
        found = f"computed too: with beta {args.beta:g} the KL term gives each of them a gradient"
        return Check(name, NOTE, found, "--beta 0, if the KL term is not needed")
    if paths.why_rows_stay is not None:
        remedy = "another --loss_type: dapo and grpo are usual" if "loss_type" in paths.why_rows_stay else ""
        return Check(name, NOTE, f"computed too: {paths.why_rows_stay}", remedy)
    if window_within_pass(args.steps_per_generation, args.gradient_accumulation_steps) is None:
        return Check(name, NOTE, "computed too: optimizer steps begin in the middle of passes")
    return Check(name, OK, "left out; the gradient is the same")


# Memory


def check_memory(
    size: "ModelSize",
    launch: Launch,
    workload: "Workload",
    machine: Machine,
    vllm_share: float = 0.0,
    reserve_gb: float | None = None,
) -> list[Check]:
    """The plan of [`trl_grpo_ext.memory`] against a GPU's memory, or the CPU's.

    Args:
        size ([`~trl_grpo_ext.memory.ModelSize`]):
            The model.
        launch ([`Launch`]):
            How it is trained.
        workload ([`~trl_grpo_ext.memory.Workload`]):
            What is computed at once.
        machine ([`Machine`]):
            Where.
        vllm_share (`float`, *optional*, defaults to `0.0`):
            Share of each GPU that a vLLM on it takes.
        reserve_gb (`float`, *optional*):
            Of a GPU, for buffers, waste and CUDA.
    """
    from .memory import CONFIGURATIONS, RESERVE_GB, plan

    on_gpu = machine.gpu_gb is not None
    reserve = (RESERVE_GB if on_gpu else 1.0) if reserve_gb is None else reserve_gb
    budget = machine.gpu_gb * (1 - vllm_share) - reserve if machine.gpu_gb is not None else machine.memory_gb - reserve
    where = "a GPU" if on_gpu else "a CPU"

    def need(configuration: str, num_gpus: int) -> float:
        memory = plan(size, configuration, num_gpus, workload)
        # processes on a CPU share its memory
        return memory.peak / GB if on_gpu else (memory.peak + memory.cpu / num_gpus) * num_gpus / GB

    needed = need(launch.configuration, launch.num_processes)
    memory = plan(size, launch.configuration, launch.num_processes, workload)
    total = machine.gpu_gb if machine.gpu_gb is not None else machine.memory_gb
    found = f"{_gb(needed)} at the peak, of them weights, gradients and optimizer {_gb(memory.states / GB)}; "
    found += f"for it are {_gb(max(budget, 0.0))} of {where} with {total:.0f}"
    found += f", beside vLLM's {vllm_share:.0%}" if vllm_share and on_gpu else ""
    rows = []
    if needed <= budget:
        rows.append(Check("memory", OK, f"fits: {found}"))
    else:
        fitting = [name for name in CONFIGURATIONS if need(name, launch.num_processes) <= budget] if on_gpu else []
        remedy = "a smaller per_device_train_batch_size, LoRA (--use_peft true), or a smaller model"
        if fitting:
            one = fitting[0]
            remedy = f"{one} fits, with {_gb(need(one, launch.num_processes))}: recipes/accelerate/{one}.yaml"
        elif on_gpu:
            more = (
                (name, count)
                for count in (2, 4, 8, 16, 32, 64)
                for name in ("zero2", "zero3")
                if count > launch.num_processes and need(name, count) <= budget
            )
            name, count = next(more, (None, 0))
            remedy = f"{name} on {count} GPUs fits; or {remedy}" if name else remedy
        rows.append(Check("memory", PROBLEM, f"does not fit: {found}", remedy))
    if on_gpu and memory.cpu > 0 and memory.cpu / GB > machine.memory_gb and not machine.is_planned:
        found = f"offload needs {_gb(memory.cpu / GB)} of a node, which has {machine.memory_gb:.0f}"
        rows.append(Check("CPU memory", PROBLEM, found, "a configuration without offload, or more nodes"))
    return rows


def _gb(number: float) -> str:
    if number < 1:
        return f"{1000 * number:.0f} MB"
    return f"{number:.0f} GB" if number >= 10 else f"{number:.1f} GB"


# Data


@dataclass
class DataFacts:
    """What was found in the data, in numbers.

    Args:
        prompt_tokens (`list[int]`), reference_tokens (`list[int]`):
            Lengths of sampled prompts and of the references of sampled rows; empty where there is no tokenizer.
        has_solutions (`bool`):
            Whether references are whole solutions; else they are bare answers.
    """

    prompt_tokens: list[int] = field(default_factory=list)
    reference_tokens: list[int] = field(default_factory=list)
    has_solutions: bool = False


def check_lengths(facts: DataFacts, max_completion_length: int, longest_position: int | None = None) -> list[Check]:
    """Prompts and references in tokens, against the longest completion and the model's positions."""
    rows = []
    if facts.prompt_tokens:
        longest = max(facts.prompt_tokens)
        found = f"median {_median(facts.prompt_tokens)} tokens, longest {longest}"
        if longest_position is not None and longest + max_completion_length > longest_position:
            found += f"; and max_completion_length {max_completion_length}: the model has {longest_position} positions"
            rows.append(Check("prompts", NOTE, found, "a smaller --max_completion_length, or another model"))
        else:
            rows.append(Check("prompts", OK, found))
    if facts.reference_tokens:
        longest, kind = max(facts.reference_tokens), "solutions" if facts.has_solutions else "bare answers"
        beyond = sum(length > 0.8 * max_completion_length for length in facts.reference_tokens)
        found = f"max_completion_length {max_completion_length}; the data's {kind}: median "
        found += f"{_median(facts.reference_tokens)} tokens, longest {longest}"
        if beyond > 0.02 * len(facts.reference_tokens):
            found += f", and {beyond} of {len(facts.reference_tokens)} near the limit or above"
            remedy = f"--max_completion_length {2 * longest}: a policy writes more than the reference"
            rows.append(Check("completion length", NOTE, found, remedy))
        else:
            rows.append(Check("completion length", OK, found))
    return rows


def _median(numbers: Sequence[int]) -> int:
    return sorted(numbers)[len(numbers) // 2]


# Rows that are looked at.
ROWS_AUDITED, ROWS_COMPARED = 10_000, 100_000


def check_references_of(
    rewards: Sequence[Any], rows: Sequence[Mapping[str, Any]], num_rows: int | None = None
) -> list[Check]:
    """Whether the data's references score full marks, by each reward of this package that compares answers.

    Args:
        rewards (`Sequence`):
            The rewards.
        rows (`Sequence[Mapping[str, Any]]`):
            Rows of the training data.
        num_rows (`int`, *optional*):
            How many there are, where these are the first ones.
    """
    from .rewards.correctness import AnswerReward

    graders = [reward for reward in rewards if isinstance(reward, AnswerReward)]
    if not graders:
        return [Check("references", OK, "no reward of this package compares answers: nothing to check")]
    is_cut = num_rows is not None and num_rows > len(rows)
    of = f" (the first of {num_rows:,} rows)" if is_cut else ""
    return [check for grader in graders for check in _check_references_of_one(grader, rows, of)]


def _check_references_of_one(grader: Any, rows: Sequence[Mapping[str, Any]], of: str) -> list[Check]:
    from .rewards.audit import audit, check_references
    from .rewards.references import reference_to_text

    texts = [reference_to_text(row.get(grader.answer_column)) for row in rows]
    places = [place for place, text in enumerate(texts) if text]
    completions = {place: grader.completion_giving(texts[place] or "") for place in places}
    known = [{**rows[place], "solution": text} for place, text in completions.items() if text is not None]
    places = [place for place in places if completions[place] is not None]  # else the user's function finds answers
    report = audit([grader], known) if known else None
    checks = []
    if report is not None and report.failures:
        first = ", ".join(
            f"row {places[failure.row]}: {one_line(failure.columns.get(grader.answer_column))[:40]!r}"
            for failure in report.failures[:3]
        )
        found = f"{len(report.failures):,} of {len(known):,} references{of} do not score full marks ({first})"
        remedy = "there a right answer gets no reward: mend the column; trl-grpo-ext audit lists them"
        checks.append(Check(grader.name, PROBLEM, found, remedy))
    else:
        try:
            check_references([grader], rows)  # what the trainer asks: the column, what it holds
        except (ValueError, TypeError) as error:
            found, _, remedy = one_line(error).rpartition(": ")
            return [Check(grader.name, PROBLEM, found, remedy)]
        checks.append(Check(grader.name, OK, f"{len(known):,} of {len(known):,} references{of} score full marks"))
    if len(known) < len(rows):
        found = f"{len(rows) - len(known):,} of {len(rows):,} rows have no reference: this reward does not score them"
        checks.append(Check(grader.name, NOTE, found))
    odd = report.not_numbers.get(grader.answer_column, []) if report is not None else []
    if odd:
        found = f"no plain number in {_count(len(odd), 'row')}: answers are right only character for character"
        remedy = "expressions want a symbolic reward, such as TRL's accuracy_reward"
        checks.append(Check(grader.name, NOTE, found, remedy))
    return checks


def check_prompts(train: Iterable[Any], heldout: Iterable[Any]) -> list[Check]:
    """Prompts that stand in the data twice, and held-out ones that are trained on."""
    texts = [_key(prompt) for prompt in train]
    distinct = set(texts)
    rows = []
    if len(distinct) < len(texts):
        found = f"{len(texts) - len(distinct):,} of {len(texts):,} prompts stand there more than once"
        rows.append(Check("duplicates", NOTE if len(distinct) < 0.95 * len(texts) else OK, found))
    held = [_key(prompt) for prompt in heldout]
    if held:
        leaked = sum(key in distinct for key in held)
        found = f"{leaked:,} of {len(held):,} held-out prompts are in the training data"
        remedy = "they measure memory: take them out of one of the two" if leaked else ""
        rows.append(Check("held out", NOTE if leaked else OK, found, remedy))
    return rows


def _key(prompt: Any) -> int:
    """Of what is asked: the last message of the user, where a prompt is messages."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        prompt = prompt[-1].get("content")
    return hash(" ".join(str(prompt).split()))


# As text


def summary_line(sections: Sections) -> str:
    """What all rows come to."""
    rows = [row for section in sections.values() for row in section]
    problems, notes = (sum(row.status == status for row in rows) for status in (PROBLEM, NOTE))
    counted = f"{len(rows)} checks: {_count(problems, 'problem')}, {_count(notes, 'note')}"
    return f"{counted}. {'Mend what is marked as a problem first.' if problems else 'Nothing stands in the way.'}"


def has_problems(sections: Sections) -> bool:
    """Whether any check has found something that must be mended."""
    return any(row.status == PROBLEM for section in sections.values() for row in section)


def python_row() -> Check:
    """The version of Python."""
    return Check("python", OK, sys.version.split()[0])
