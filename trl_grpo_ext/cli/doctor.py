"""`trl-grpo-ext doctor`: before a run, what this machine, this model and these settings will get, and what is wrong.

It takes the options of `trl-grpo-ext grpo` or of the recipe, on the command line or in the file that `--config` names;
without any, it looks at packages and machine. Nothing is downloaded, and no network asked: what is not on this machine
is said to be so. Exit status: 0 nothing is a problem, 1 something is, 2 wrong arguments.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, requires, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentError, OneLineParser
from ..exits import stop
from ..screen import show
from ._files import check_outputs, write_json


if TYPE_CHECKING:
    from rich.console import Group

    from ..preflight import Check, DataFacts, FastPaths, Launch, Machine, Sections

PROGRAM = "trl-grpo-ext doctor"
DESCRIPTION = (
    "What one asks before a run: versions; what this machine, this model and these settings will get of the fast "
    "paths, and why not of the others; memory against the plan; whether the data's references score full marks. "
    "Takes the options of `trl-grpo-ext grpo`, which lists them, or those of recipes/gsm8k.py, those of `accelerate "
    "launch` among them, and these. Downloads nothing. Exit status: 0 nothing is a problem, 1 something is, 2 wrong "
    "arguments."
)
EXAMPLE = """
trl-grpo-ext doctor                                                    # packages and machine
trl-grpo-ext doctor --config recipes/configs/qwen2.5-0.5b.yaml         # before the recipe is started
trl-grpo-ext doctor --config outputs/run/run.yaml --num_processes 8 --accelerate_config zero2
trl-grpo-ext doctor --config run.yaml --gpu_gb 80 --num_processes 8    # on a login node, for another machine
"""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
ARITHMETIC = "arithmetic"  # the recipe's default
# Rows of which lengths are taken.
ROWS_TOKENIZED = 500


@dataclass
class DoctorOptions:
    """What is asked beside a run's own options."""

    json: str | None = field(default=None, metadata={"help": "Write the rows to this file too."})
    gpu_gb: float | None = field(
        default=None,
        metadata={"help": "Plan for --num_processes GPUs of so many GB, which are on another machine."},
    )

    def __post_init__(self) -> None:
        if self.gpu_gb is not None and not self.gpu_gb > 0:
            raise ValueError(f"--gpu_gb must be above 0, got {self.gpu_gb}")


@dataclass
class RecipeOptions:
    """What `recipes/gsm8k.py` has that `trl-grpo-ext grpo` has not."""

    bundle: str | None = field(default=None, metadata={"help": "The recipe's rewards."})
    train_items: int | None = field(default=None, metadata={"help": "The recipe's number of training problems."})
    prompt_example: bool = field(default=False, metadata={"help": "Whether the recipe shows an example."})


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        OneLineParser([DoctorOptions], prog=PROGRAM, description=DESCRIPTION, example=EXAMPLE).print_help()
        return
    was_offline = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)
    with without_network():
        plan, options = parse(arguments)
        check_outputs({}, {"--json": options.json})
        sections = examine(plan, this_machine(plan, options.gpu_gb, was_offline))
    print_sections(sections)
    if options.json is not None:
        write_json(options.json, {name: [asdict(row) for row in rows] for name, rows in sections.items()})

    from ..preflight import has_problems

    sys.exit(1 if has_problems(sections) else 0)


@contextmanager
def without_network() -> Iterator[None]:
    """Within it nobody asks the hub: what looks for something there finds it in its cache, or fails at once."""
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(dict.fromkeys(OFFLINE, "1"))  # for what is imported from here on
    import datasets
    import huggingface_hub.constants as constants

    loaded = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE = loaded
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# Arguments


@dataclass(frozen=True)
class Plan:
    """What is asked about: nothing but the machine, where there are no arguments of a run.

    Args:
        run (`Any`), training (`Any`), model (`Any`), mixture (`Any`):
            The options of `trl-grpo-ext grpo`, and in `run` those of the recipe.
        launch ([`~trl_grpo_ext.preflight.Launch`]):
            How processes are started.
        given (`Mapping[str, Any]`):
            Each option's value, as [`OneLineParser.given`] has it.
    """

    run: Any
    training: Any
    model: Any
    mixture: Any
    launch: "Launch"
    given: Mapping[str, Any]

    @property
    def is_recipe(self) -> bool:
        """Whether these are the recipe's options, and not those of `trl-grpo-ext grpo`."""
        return self.run.bundle is not None


def parse(arguments: Sequence[str]) -> tuple[Plan | None, DoctorOptions]:
    """What is asked about; ends the process with status 2 if an option is wrong."""
    from trl import DatasetMixtureConfig, ModelConfig

    from .. import GRPOExtConfig
    from ..grpo import GRPOExtScriptArguments, launcher_options
    from ..runs import CHANGED
    from .grpo import NamesParser, split_arguments

    @dataclass
    class RunOptions(RecipeOptions, GRPOExtScriptArguments):
        """Of the recipe, and of `trl-grpo-ext grpo`."""

    kinds = [DoctorOptions, RunOptions, GRPOExtConfig, ModelConfig, DatasetMixtureConfig]
    launcher = split_arguments(arguments, NamesParser(kinds, prog=PROGRAM))
    ours = launcher.training_script_args
    launch = launch_of(launcher)

    kinds[2] = planned_config(GRPOExtConfig, launch.num_processes)
    parser = OneLineParser(kinds, prog=PROGRAM)
    try:
        options, *parsed = parser.parse_script(ours, ignore=[CHANGED, *launcher_options()])
    except ArgumentError as error:
        stop(2, error)
    asks_about_run = set(without_values(ours)) - {"--json", "--gpu_gb"}
    run, training, model, mixture = parsed
    given = dict(parser.given)
    if run.bundle is not None and run.dataset_name is None:
        run.dataset_name = given["dataset_name"] = ARITHMETIC
    plan = Plan(run, training, model, mixture, launch, given)
    return (plan if asks_about_run else None), options


def planned_config(base: Any, num_processes: int) -> type:
    """A class of settings as they are among so many processes, which can be made where there is no GPU too."""
    import torch
    from transformers.utils import is_torch_bf16_gpu_available

    def fill_in(settings: Any) -> None:
        settings.wants_gpu = not settings.use_cpu
        settings.wants_bf16 = not settings.fp16 if settings.bf16 is None else settings.bf16
        if not torch.accelerator.is_available():  # transformers would refuse bf16
            settings.use_cpu = True
        elif settings.wants_gpu and settings.wants_bf16 and not is_torch_bf16_gpu_available():
            settings.bf16 = False
        base.__post_init__(settings)

    return type("PlannedConfig", (base,), {"world_size": property(lambda _: num_processes), "__post_init__": fill_in})


def without_values(arguments: Sequence[str]) -> list[str]:
    """The names of the options of a command line."""
    return [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]


def launch_of(launcher: Any) -> "Launch":
    """How processes would be started, by the options of `accelerate launch` and the file that they name."""
    import torch
    import yaml
    from accelerate.commands.config.config_args import default_config_file

    from ..preflight import Launch

    file = launcher.config_file or (default_config_file if os.path.isfile(default_config_file) else None)
    content: dict[str, Any] = {}
    if file is not None:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            stop(2, f"--config_file: {error}")
    kind = content.get("distributed_type", "")
    deepspeed = content.get("deepspeed_config") or {}
    uses_deepspeed = bool(launcher.use_deepspeed or kind == "DEEPSPEED")
    uses_fsdp = bool(launcher.use_fsdp or kind == "FSDP")
    use_cpu = bool(launcher.cpu or content.get("use_cpu"))
    available = 1 if use_cpu else max(1, torch.cuda.device_count())
    num_processes = launcher.num_processes or content.get("num_processes") or available
    name = Path(launcher.config_file).stem if launcher.config_file else "no launch configuration"
    if uses_fsdp:
        return Launch(num_processes, "zero3", f"{name} (FSDP, counted as ZeRO-3)")
    if not uses_deepspeed:
        return Launch(num_processes, "ddp", name)
    if "deepspeed_config_file" in deepspeed or launcher.deepspeed_config_file:
        deepspeed = of_deepspeed_file(launcher.deepspeed_config_file or deepspeed["deepspeed_config_file"])
    stage = int(launcher.zero_stage or deepspeed.get("zero_stage") or 2)
    offloads = "cpu" in (launcher.offload_optimizer_device, deepspeed.get("offload_optimizer_device"))
    configuration = "ddp" if stage == 0 else f"zero{stage}" + ("_offload" if offloads and stage > 1 else "")
    return Launch(num_processes, configuration, name, uses_deepspeed=True)


def of_deepspeed_file(file: str) -> dict[str, Any]:
    """A DeepSpeed configuration in accelerate's words."""
    import json

    try:
        zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError) as error:
        stop(2, f"the DeepSpeed configuration {file!r}: {error}")
    return {
        "zero_stage": zero.get("stage", 0),
        "offload_optimizer_device": (zero.get("offload_optimizer") or {}).get("device"),
    }


# What there is


def this_machine(plan: Plan | None, gpu_gb: float | None, is_offline: bool) -> "Machine":
    """The machine as torch sees it; with `--gpu_gb` another one's GPUs in their place."""
    import shutil

    import psutil  # type: ignore[import-untyped]
    import torch

    from ..preflight import GB, Gpu, Machine

    gpus = []
    if torch.cuda.is_available() and gpu_gb is None:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            gpus.append(Gpu(name, round(total / GB), round(free / GB), f"{major}.{minor}", has_bf16=major >= 8))
    elif gpu_gb is not None:
        gpus = [Gpu("GPU", gpu_gb, gpu_gb)] * (plan.launch.num_processes if plan is not None else 1)
    memory = psutil.virtual_memory()
    disk = None
    if plan is not None:
        folder = Path(plan.training.output_dir).absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        disk = shutil.disk_usage(there).free / GB
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=memory.total / GB,
        available_gb=memory.available / GB,
        gpus=() if plan is not None and not plan.training.wants_gpu else tuple(gpus),
        disk_gb=disk,
        hidden_gpus=not gpus and shutil.which("nvidia-smi") is not None,
        is_planned=gpu_gb is not None,
        is_offline=is_offline,
    )


def examine(plan: Plan | None, machine: "Machine") -> "Sections":
    """All checks, by section."""
    from ..preflight import check_machine, guarded

    training = None if plan is None else plan.training
    sections = {
        "packages": guarded("packages", check_packages, plan),
        "machine": guarded("machine", check_machine, machine, training),
    }
    if plan is not None:
        examination = Examination(plan, machine)
        sections["machine"] += guarded("launch", examination.check_launch)
        for name, checks in {
            "model": (examination.check_model,),
            "data": (examination.check_data, examination.check_references, examination.check_lengths),
            "settings": (examination.check_settings, examination.check_batches, examination.check_learning),
            "fast paths": (examination.check_fast_paths,),
            "memory": (examination.check_memory,),
            "output folder": (examination.check_start,),
        }.items():
            rows = [row for check in checks for row in guarded(check.__name__.removeprefix("check_"), check)]
            sections[name] = rows
    return {name: rows for name, rows in sections.items() if rows}


def check_packages(plan: Plan | None) -> "list[Check]":
    from ..extras import TRAIN
    from ..preflight import NOTE, OPTIONAL, Check, check_versions, names_of_training, python_row, read_constraints

    try:
        requirements = requires("trl_grpo_ext") or []
    except PackageNotFoundError:  # a checkout that is used as it is
        requirements = []
    names = names_of_training(requirements) or TRAIN
    tested = read_constraints(CONSTRAINTS.read_text(encoding="utf-8")) if CONSTRAINTS.is_file() else None
    wanted = set()
    if plan is not None:
        wanted = {"vllm"} if plan.training.use_vllm else set()
        wanted |= {"deepspeed"} if plan.launch.uses_deepspeed else set()
    installed = {name: installed_version(name) for name in (*names, *OPTIONAL)}
    rows = [python_row(), *check_versions(requirements, installed, tested, wanted)]
    if not requirements:
        rows.append(Check("trl_grpo_ext", NOTE, "is not installed: its ranges are not known", "pip install ."))
    return rows


def installed_version(name: str) -> str | None:
    if name == "torch":
        import torch

        return str(torch.__version__)
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class Examination:
    """The checks of one plan, with what they learn for one another: a model, its tokenizer, the data."""

    def __init__(self, plan: Plan, machine: "Machine") -> None:
        self.plan, self.machine = plan, machine
        self.config: Any = None
        self.size: Any = None
        self.tokenizer: Any = None
        self.train: Any = None
        self.heldout: dict[str, Any] = {}
        self.facts: DataFacts | None = None

    # Model

    def check_launch(self) -> "list[Check]":
        import shutil
        from importlib.util import find_spec

        from ..preflight import check_launch

        has_compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
        has_ninja = shutil.which("ninja") is not None or find_spec("ninja") is not None
        return check_launch(self.plan.launch, self.machine, has_compiler, has_ninja)

    def check_model(self) -> "list[Check]":
        from ..memory import model_size
        from ..preflight import NOTE, OK, PROBLEM, Check

        name = self.plan.model.model_name_or_path
        if name is None:
            return [Check("model", NOTE, "none is named", "--model_name_or_path: a folder, a name, or 'embedded'")]
        folder = self._folder_of_model(name)
        rows = []
        if folder is None:
            self.config = published_shape(name)
            found = f"{name} is not on this machine"
            if self.machine.is_offline:
                remedy = "name a folder, or download it where there is a network: hf download " + name
                rows.append(Check("model", PROBLEM, f"{found}, and the hub must not be asked", remedy))
            else:
                rows.append(Check("model", NOTE, f"{found}: the run downloads it", f"hf download {name}"))
            if self.config is None:
                return rows
            rows.append(Check("shape", OK, "taken from what is published of this model"))
        else:
            rows += self._load(name, folder)
        if self._takes_more_than_text:
            return [*rows, Check("size", NOTE, "not counted: the model takes more than text")]
        lora_rank = self.plan.model.lora_r if self.plan.model.use_peft else 0
        self.size = model_size(self.config, lora_rank)
        found = f"{amount(self.size.parameters)} parameters, {self.config.num_hidden_layers} layers"
        found += f"; trained: LoRA of rank {lora_rank}, {amount(self.size.trained)}" if lora_rank else "; all trained"
        rows.insert(1, Check("size", OK, found))
        return rows

    @property
    def _takes_more_than_text(self) -> bool:
        return self.config is not None and self.config.get_text_config() is not self.config

    def _folder_of_model(self, name: str) -> Path | None:
        """Where a model's files are, if they are on this machine."""
        from huggingface_hub import try_to_load_from_cache

        from ..script import model_path

        path = Path(model_path(self.plan.model)).expanduser()
        if path.is_dir():
            return path
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ValueError(f"there is no folder {name!r}")
        cached = try_to_load_from_cache(name, "config.json", revision=self.plan.model.model_revision)
        return Path(cached).parent if isinstance(cached, str) else None

    def _load(self, name: str, folder: Path) -> "list[Check]":
        """Configuration and tokenizer of a model on this machine, and what is to be said about them."""
        from transformers import AutoConfig, AutoTokenizer

        from ..preflight import NOTE, OK, PROBLEM, Check

        trusts = self.plan.training.trust_remote_code
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=trusts, local_files_only=True)
        where = {"embedded": "ships with the package"}.get(name, "in the cache" if str(folder) != name else "a folder")
        rows = [Check("model", OK, f"{name} ({self.config.model_type}), {where}")]
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            rows = [Check("model", PROBLEM, f"{folder} has a configuration and no weights", f"hf download {name}")]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts, local_files_only=True)
        except (OSError, ValueError) as error:
            return [*rows, Check("tokenizer", PROBLEM, f"cannot be loaded: {error}", "the folder needs its files")]
        if self.tokenizer.chat_template is None:
            remedy = "an instruction-tuned model, or prompts that are texts"
            rows.append(Check("chat template", NOTE, "none: prompts that are messages cannot be written", remedy))
        else:
            rows.append(Check("chat template", OK, "there is one"))
        eos = self.tokenizer.eos_token
        remedy = "" if eos else "without one no completion ends: set eos_token"
        rows.append(Check("end of text", OK if eos else PROBLEM, eos or "the tokenizer names none", remedy))
        return rows

    # Data

    def check_data(self) -> "list[Check]":
        from ..preflight import NOTE, OK, ROWS_COMPARED, Check, check_prompts

        name = self.plan.run.dataset_name
        if name is None and not self.plan.mixture.datasets:
            return [Check("data", NOTE, "no data set is named", "--dataset_name: a file, a folder or a name")]
        try:
            with quiet_progress():
                self.train, self.heldout = load_recipe(self.plan, name) if self.plan.is_recipe else load(self.plan)
        except FileNotFoundError as error:
            if may_be_on_hub(name):
                return [self._not_local(name)]
            raise ValueError(f"{error}") from None
        except (ConnectionError, OSError) as error:
            if may_be_on_hub(name):
                return [self._not_local(name)]
            raise ValueError(f"{error}") from None
        columns = ", ".join(self.train.column_names or next(iter(self.train)))
        size = f"{len(self.train):,} rows" if hasattr(self.train, "__len__") else "a stream"
        held = "; ".join(f"{len(rows):,} {title}" for title, rows in self.heldout.items() if hasattr(rows, "__len__"))
        rows = [
            Check("data", OK, f"{name or 'a mixture'}: {size} ({columns})" + (f"; held out: {held}" if held else ""))
        ]
        prompts = [row["prompt"] for row in first(self.train, ROWS_COMPARED, ["prompt"])]
        heldout = [row["prompt"] for part in self.heldout.values() for row in first(part, ROWS_COMPARED, ["prompt"])]
        rows += check_prompts(prompts, heldout)
        if self.tokenizer is not None and self.tokenizer.chat_template is None and not isinstance(prompts[0], str):
            raise ValueError("the prompts are messages, and the model has no chat template to write them with")
        return rows

    def _not_local(self, name: str | None) -> "Check":
        from ..preflight import NOTE, PROBLEM, Check

        found = f"{name} is not on this machine"
        if self.machine.is_offline:
            remedy = "--dataset_name: the path of a file or a folder with it"
            return Check("data", PROBLEM, f"{found}, and the hub must not be asked", remedy)
        return Check("data", NOTE, f"{found}: the run downloads it", f"hf download --repo-type dataset {name}")

    def check_references(self) -> "list[Check]":
        from ..preflight import NOTE, OK, ROWS_AUDITED, Check, check_references_of
        from ..rewards.bundle import RewardBundle
        from ..rewards.names import find_rewards

        run = self.plan.run
        names = run.bundle if self.plan.is_recipe else run.reward_funcs
        if not names:
            if run.reward_model_name_or_path:
                return [Check("rewards", OK, f"a reward model, {run.reward_model_name_or_path}")]
            return [Check("rewards", NOTE, "none is named", "--reward_funcs gsm8k, or a dotted name of your own")]
        bundle = RewardBundle(find_rewards(names), self.plan.training.reward_weights)
        weighed = [f"{weight:g} x {name}" for name, weight in zip(bundle.names, bundle.weights, strict=True)]
        rows = [Check("rewards", OK, ", ".join(bundle.names if set(bundle.weights) == {1.0} else weighed))]
        if self.train is not None:
            sample = first(self.train, ROWS_AUDITED)
            num_rows = len(self.train) if hasattr(self.train, "__len__") else None
            rows += check_references_of(bundle, sample, num_rows)
        return rows

    def check_lengths(self) -> "list[Check]":
        from ..preflight import DataFacts, check_lengths

        if self.tokenizer is None or self.train is None:
            return []
        sample = first(self.train, ROWS_TOKENIZED)
        column = "solution" if "solution" in sample[0] else "answer"
        references = [str(row[column]) for row in sample if row.get(column) not in (None, "")]
        self.facts = DataFacts(
            prompt_tokens=self._lengths([self._written(row["prompt"]) for row in sample]),
            reference_tokens=self._lengths(references),
            has_solutions=column == "solution",
        )
        positions = getattr(self.config, "max_position_embeddings", None)
        return check_lengths(self.facts, self.plan.training.max_completion_length, positions)

    def _written(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    # Settings

    def check_settings(self) -> "list[Check]":
        from ..preflight import PROBLEM, Check
        from ..script import check_settings

        if self.plan.model.model_name_or_path is not None:
            with redirect_stderr(StringIO()):  # it comes as a row
                check_settings(self.plan.training, self.plan.model)
        if self.plan.is_recipe and self.plan.training.remove_unused_columns:
            found = "would remove the answers, which the rewards need"
            return [Check("remove_unused_columns", PROBLEM, found, "leave it out")]
        return []

    def check_batches(self) -> "list[Check]":
        from ..preflight import check_batches

        num_prompts = len(self.train) if hasattr(self.train, "__len__") else None
        return check_batches(self.plan.training, self.plan.launch.num_processes, num_prompts)

    def check_learning(self) -> "list[Check]":
        from ..preflight import check_settings_of_learning

        parameters = None if self.size is None else self.size.parameters
        return check_settings_of_learning(self.plan.training, parameters, self.plan.model.use_peft)

    def check_fast_paths(self) -> "list[Check]":
        from ..preflight import NOTE, OK, Check, check_fast_paths

        if self._takes_more_than_text:
            return [Check("packed rows", NOTE, "no: the model takes more than text")]
        if self.config is None:
            return [Check("packed rows", NOTE, "not looked at: the model's configuration is not on this machine")]
        training, model = self.plan.training, self.plan.model
        rows = check_fast_paths(self._rehearsed(), training)
        left_out = {
            "use_liger_kernel": training.use_liger_kernel,
            "torch_compile": training.torch_compile,
            "load_in_4bit": model.load_in_4bit,
            "load_in_8bit": model.load_in_8bit,
        }
        names = ", ".join(name for name, is_on in left_out.items() if is_on)
        if names:
            found = f"{names}: the run itself holds packed rows against padded ones when it begins"
            rows.append(Check("not tried here", OK, found))
        return rows

    def _rehearsed(self) -> "FastPaths":
        from transformers import AutoTokenizer

        from ..embedded_policy import embedded_policy_path
        from ..rehearsal import rehearse

        tokenizer = self.tokenizer or AutoTokenizer.from_pretrained(embedded_policy_path())
        paths = rehearse(self.config, tokenizer, self.plan.training, self.plan.model, self._longest_row)
        # a CPU says nothing of the GPU that is meant
        return replace(paths, kernel=None) if self.plan.training.wants_gpu and self.plan.training.use_cpu else paths

    @property
    def _longest_prompt(self) -> int:
        return max(self.facts.prompt_tokens, default=256) if self.facts is not None else 256

    @property
    def _longest_row(self) -> int:
        return self._longest_prompt + self.plan.training.max_completion_length

    def check_memory(self) -> "list[Check]":
        from ..memory import Workload
        from ..preflight import NOTE, Check, check_memory

        if self.size is None:
            return [Check("memory", NOTE, "not counted: the model's size is not known")]
        training = self.plan.training
        workload = Workload(
            rows=training.per_device_train_batch_size,
            prompt_tokens=self._longest_prompt,
            completion_tokens=training.max_completion_length,
            vllm=training.use_vllm,
            keeps_reference=training.beta != 0.0 and not self.plan.model.use_peft,
        )
        is_beside = training.use_vllm and training.vllm_mode == "colocate" and not training.vllm_enable_sleep_mode
        share = training.vllm_gpu_memory_utilization if is_beside else 0.0
        return check_memory(self.size, self.plan.launch, workload, self.machine, share)

    def check_start(self) -> "list[Check]":
        from ..preflight import NOTE, OK, PROBLEM, Check
        from ..runs import RunError, choose_start, settings_of

        training, run = self.plan.training, self.plan.run
        if training.output_dir is None:
            return [Check("output_dir", PROBLEM, "none is named", "--output_dir outputs/run")]
        try:
            start = choose_start(
                training.output_dir,
                settings_of(self.plan.given),
                training.resume_from_checkpoint,
                overwrite_run=run.overwrite_run,
                allow_changed_settings=run.allow_changed_settings,
            )
        except RunError as error:
            found, _, remedy = str(error).rpartition(": ")
            return [Check("start", PROBLEM, found, remedy)]
        goes_on = "afresh" if start.checkpoint is None else f"from {start.checkpoint}"
        rows = [Check("start", OK, f"{goes_on}, in {training.output_dir}")]
        return rows + [Check("start", NOTE, note) for note in start.notes if not note.startswith("goes on from")]


def published_shape(name: str) -> Any:
    """The configuration of a model whose shape is known without its files; `None` for others."""
    import re

    from ..memory import SHAPES, load_config

    found = re.search(r"Qwen2\.5-(?:Math-|Coder-)?([0-9.]+B)\b", name)
    return load_config(found[1]) if found is not None and found[1] in SHAPES else None


def amount(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def may_be_on_hub(name: str | None) -> bool:
    from ..tasks.files import is_on_disk

    return name is not None and not is_on_disk(name) and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def load(plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The data sets of `trl-grpo-ext grpo`."""
    from trl import get_dataset

    from ..grpo import choose_split, load_eval_dataset, load_splits

    run = plan.run
    name = "datasets" if plan.mixture.datasets else run.dataset_name
    splits = get_dataset(plan.mixture) if plan.mixture.datasets else load_splits(name, run)
    train = choose_split(splits, run.dataset_train_split, name, run)
    evaluates = plan.training.eval_strategy != "no" or run.eval_dataset_name is not None
    if not evaluates:
        return train, {}
    if run.eval_dataset_name is None:
        return train, {"problems": choose_split(splits, run.dataset_test_split, name, run)}
    return train, {"problems": load_eval_dataset(run.eval_dataset_name, run)}


def load_recipe(plan: Plan, name: str) -> tuple[Any, dict[str, Any]]:
    """The data sets of the recipe, which holds out the last rows of a file."""
    from ..tasks import hold_out, load_arithmetic, load_problems

    run, seed = plan.run, plan.training.seed
    if name == ARITHMETIC:
        return load_arithmetic("train", run.train_items or 4096, seed), {
            "problems": load_arithmetic("heldout", run.eval_items, seed),
            "of unseen templates": load_arithmetic("heldout_templates", run.eval_items, seed),
        }
    train = load_problems(name, split="train", with_example=run.prompt_example)
    if run.eval_dataset_name is None and Path(name).is_file():
        train, heldout = hold_out(train, run.eval_items, name)
    else:
        heldout = load_problems(
            run.eval_dataset_name or name, split="test", with_example=run.prompt_example, max_rows=run.eval_items
        )
    if run.train_items is not None:
        train = train.select(range(min(run.train_items, len(train))))
    return train, {"problems": heldout}


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Within it data sets are loaded without bars."""
    import datasets

    shows = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shows:
            datasets.enable_progress_bars()


def first(rows: Any, number: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The first rows of a data set or a stream."""
    from itertools import islice

    if columns is not None and hasattr(rows, "select_columns"):
        rows = rows.select_columns([*columns])
    return list(islice(iter(rows), number))


# On the screen

MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def print_sections(sections: "Sections") -> None:
    from ..preflight import summary_line

    show(lambda: make_tables(sections))
    print(summary_line(sections))


def make_tables(sections: "Sections") -> "Group":
    """A table a section; what to do stands below what was found."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables: list[Any] = []
    widest = max(len(row.name) for rows in sections.values() for row in rows)
    for name, rows in sections.items():
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        table.add_column(width=max(map(len, MARKS.values())))
        table.add_column(width=widest)
        table.add_column(overflow="fold")
        for row in rows:
            found = Text(row.found)
            if row.remedy:
                found.append(f"\n-> {row.remedy}", style="bold" if row.status == "problem" else "dim")
            table.add_row(Text(MARKS[row.status], style=STYLES[row.status]), row.name, found)
        tables += [Text(name, style="bold"), table, Text()]
    return Group(*tables)
