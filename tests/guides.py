r"""Reads the guides, and runs what stands in them: tests of pages that are written for people.

How a block of a page (`recipes/guides/*.md`) is run, in the order in which they stand, in a folder of the page's own:

- ```python: in one namespace with the others of its page; a ```text block behind it is in what it prints.
- ```bash: the options of each command are held against those of its program, and commands that take seconds are run.
- `<!-- file: NAME -->` on the line before any block: it is written to that file, and Python is not run here.
- `<!-- not run: WHY -->` there: the block is compiled, its names and options are looked up, and that is all.

What a reader sees is what somebody would write for a GPU and the hub. What is put in its place is all here: `MODELS`
lie in the hub's cache under the names of the hub, `DATASETS` stand for data sets of the hub, and the settings of
`SMALL` go over those of each `GRPOConfig`, which is checked as it is written before; a hundred steps are one.
"""

import ast
import copy
import importlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launch import ROOT, load_script


GUIDES = ROOT / "recipes" / "guides"

# The settings of a run that takes a second or two; the first one also holds for what a page really says.
PLACE = {"use_cpu": True}
SMALL = {
    **PLACE,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "num_generations": 4,
    "max_completion_length": 24,
    "logging_steps": 1,
    "disable_tqdm": True,
}
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B")  # the second one's chat template knows tools
REWARD_MODELS = ("Skywork/Skywork-Reward-V2-Qwen3-0.6B",)
DATASETS = ("openai/gsm8k",)


@dataclass
class Block:
    """A fenced block of a page: its language, its text, and what is said about it in a comment before."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None = None
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    lines = page.read_text().splitlines()
    opened: Block | None = None
    for number, line in enumerate(lines, start=1):
        if opened is not None:
            if line == "```":
                blocks.append(opened)
                opened = None
            else:
                opened.text += f"{line}\n"
        elif line.startswith("```"):
            opened = Block(page, number + 1, line[3:].strip(), "")
            comment = re.fullmatch(r"<!-- (file|not run): (.+) -->", lines[number - 2]) if number > 1 else None
            if comment is not None:
                setattr(opened, comment[1].replace(" ", "_"), comment[2])
    assert opened is None, f"{opened}: the block does not end"
    return blocks


# Python


def look_at_python(block: Block) -> None:
    """Compile a block; what it imports must be there, and the settings it names must be some."""
    source = re.sub(r",\s*\.\.\.\s*\)", ")", block.text)  # f(name=value, ...)
    for node in ast.walk(ast.parse(source, str(block))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and is_known(node.module):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CONFIGS:
            known = {item.name for item in fields(config_class(node.func.id))}
            unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - known
            assert not unknown, f"{block}: {node.func.id} has no {', '.join(sorted(unknown))}"


CONFIGS = ("GRPOConfig", "GRPOExtConfig", "LoraConfig")


def is_known(module: str) -> bool:
    return module.split(".")[0] in ("accelerate", "datasets", "peft", "transformers", "trl", "trl_grpo_ext")


def config_class(name: str) -> type:
    import peft
    import trl

    import trl_grpo_ext

    return next(getattr(module, name) for module in (trl, peft, trl_grpo_ext) if hasattr(module, name))


# Shell


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as lists of words, without comments, `&`, variables before them and `...`."""
    for line in text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word not in ("&", "...")]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def look_at_command(words: Sequence[str]) -> None:
    """Hold the options of a command against those of the program; scripts and files of the project must be there."""
    program, *arguments = words
    if program == "accelerate":
        assert arguments.pop(0) == "launch"
        look_at_launch(arguments)
    elif program == "trl-grpo-ext":
        look_at_subcommand(*arguments)
    elif program == "sbatch":
        place = next(place for place, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (ROOT / arguments[place]).is_file(), arguments[place]
        options = arguments[place + 1 :]
        look_at_recipe(options if not options or options[0].startswith("-") else options[1:])
    elif program in ("python", "bash"):
        script = next(word for word in arguments if not word.startswith("-"))
        assert (ROOT / script).is_file(), script
        text = "".join(path.read_text() for path in (ROOT / "scripts").glob(f"{Path(script).stem}.*"))
        for option in arguments:
            if option.startswith("--"):
                assert f'"{option}"' in text or re.search(rf"^    {option[2:]}\b", text, re.M), (script, option)
    elif program == "trl":
        look_at_trl(arguments)
    else:
        assert program in OTHER_PROGRAMS, f"what is {program!r}?"


# What is no program of this project, and cannot be asked here for its options.
OTHER_PROGRAMS = ("cd", "curl", "export", "mutmut", "pip", "pytest", "tensorboard", "trl", "vllm", "wandb")


def look_at_launch(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = lambda message: (_ for _ in ()).throw(AssertionError(f"accelerate launch: {message}"))
    options = parser.parse_args(arguments)
    if options.config_file is not None:
        assert (ROOT / options.config_file).is_file(), options.config_file
    script, rest = options.training_script, options.training_script_args
    if options.module and script == "trl_grpo_ext":
        look_at_subcommand(*rest)
    elif options.module:
        assert script == "trl_grpo_ext.grpo", script
        look_at_subcommand("grpo", *rest)
    elif script == "recipes/gsm8k.py":
        look_at_recipe(rest)
    elif script.startswith("scripts/"):
        look_at_command(["python", script, *rest])
    else:
        assert Path(script).is_file() or not script.startswith(("recipes", "scripts")), script


def look_at_recipe(arguments: list[str]) -> None:
    from trl import ModelConfig

    from trl_grpo_ext import GRPOExtConfig

    recipe = load_script(ROOT / "recipes" / "gsm8k.py")
    look_at_options([recipe.RecipeArguments, GRPOExtConfig, ModelConfig], arguments)


def look_at_trl(arguments: list[str]) -> None:
    from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig
    from trl.scripts.grpo import GRPOScriptArguments

    if arguments.pop(0) == "grpo":
        look_at_options([GRPOScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig], arguments)


def look_at_options(kinds: list[type], arguments: Sequence[str]) -> None:
    from trl_grpo_ext.cli.grpo import NamesParser

    parser = NamesParser(kinds)
    arguments = [str(file_of(word)) if before == "--config" else word for before, word in pairs(arguments)]
    in_file, on_command_line = parser.parse_known_script(arguments)
    assert not in_file[::2], in_file
    assert not on_command_line, on_command_line


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(["", *words], words, strict=False)


def file_of(name: str) -> Path:
    """A file of the page's folder or of the project."""
    return Path(name) if Path(name).exists() else ROOT / name


def look_at_subcommand(name: str, *arguments: str) -> None:
    """Hold a subcommand's options against what its own parser says when it is asked for help."""
    from trl_grpo_ext.cli import SUBCOMMANDS
    from trl_grpo_ext.cli.grpo import NamesParser, split_arguments
    from trl_grpo_ext.grpo import OPTIONS, launcher_options

    assert name in SUBCOMMANDS, name
    if name == "launch":
        look_at_launch(list(arguments))
        return
    if name == "grpo" and not {"--help", "--help_all"} & set(arguments):
        split_arguments([str(file_of(word)) if before == "--config" else word for before, word in pairs(arguments)])
        return
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")} - {"--help", "--help_all"}
    known = set(re.findall(r"--\w+", help_of(name)))
    if name == "doctor":  # it takes what training takes
        names = [*vars(NamesParser(OPTIONS).parse_known_args([])[0]), *launcher_options()]
        known |= {f"--{option}" for option in names}
    assert not given - known, f"trl-grpo-ext {name} has no {', '.join(sorted(given - known))}"


def help_of(subcommand: str) -> str:
    from trl_grpo_ext.cli import main

    printed = io.StringIO()
    with redirect_stdout(printed), patch.dict(os.environ, COLUMNS="1000"), suppress(SystemExit):
        main([subcommand, "--help"])
    return printed.getvalue()


# Running

RUN_SUBCOMMANDS = ("audit", "compare", "doctor", "grade", "report", "score")


def run_command(words: Sequence[str]) -> str:
    """Run a command if it is one that takes seconds; what it prints."""
    from trl_grpo_ext.cli import SUBCOMMANDS, main

    if words[0] != "trl-grpo-ext" or words[1] not in RUN_SUBCOMMANDS or words[1] not in SUBCOMMANDS:
        return ""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main([*words[1:], *(("--use_cpu", "true") if words[1] == "doctor" else ())])
        except SystemExit as error:
            if error.code:
                raise AssertionError(f"{shlex.join(words)}: {printed.getvalue()}") from error
    return printed.getvalue()


def run_page(page: Path) -> None:
    """Run a page's blocks in the working folder."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    printed = ""
    for block in blocks_of(page):
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)
        elif block.language == "text" and block.not_run is None:
            assert block.text.strip() in printed, f"{block}: printed was {printed}"
        elif block.language == "bash" and block.not_run is None:
            for words in commands_of(block.text):
                look_at_command(words)
                run_command(words)
        elif block.language == "python" and block.not_run is None:
            caught = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with redirect_stdout(caught):
                exec(code, namespace)
            printed = caught.getvalue()


@contextmanager
def in_a_folder(folder: Path) -> Iterator[None]:
    """A page's own working folder, whose modules can be imported and are forgotten afterwards."""
    modules, path = set(sys.modules), list(sys.path)
    with chdir(folder):
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path[:] = path
            for name in set(sys.modules) - modules:
                if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                    del sys.modules[name]


# In place of the hub and of a GPU


@contextmanager
def small_runs() -> Iterator[None]:
    """Settings are checked as they are written, and then made those of a run that takes seconds."""
    from trl import GRPOConfig

    original = GRPOConfig.__post_init__

    def check_and_make_small(config: GRPOConfig) -> None:
        for settings in (PLACE, SMALL):
            config_as_written = copy.copy(config) if settings is PLACE else config
            for name, value in settings.items():
                setattr(config_as_written, name, value)
            if settings is SMALL:
                for name in ("max_steps", "save_steps", "eval_steps"):
                    steps = getattr(config, name) or 0
                    setattr(config, name, max(1, int(steps / 100)))
            original(config_as_written)

    with patch.object(GRPOConfig, "__post_init__", check_and_make_small):
        yield


@contextmanager
def hub_of_tiny_models(folder: Path) -> Iterator[None]:
    """The hub's cache with tiny models in it, under the names of the hub."""
    import trl
    from huggingface_hub.constants import HF_HUB_CACHE
    from tiny import save_tiny_reward_model
    from transformers import AutoTokenizer

    from trl_grpo_ext.embedded_policy import embedded_policy_path

    templates = Path(trl.__file__).parent / "chat_templates"
    placed = []
    try:
        for name in MODELS:
            snapshot = place_in_cache(Path(HF_HUB_CACHE), name, embedded_policy_path())
            placed.append(snapshot.parent.parent)
            if "Qwen3" in name:
                tokenizer = AutoTokenizer.from_pretrained(snapshot)
                tokenizer.chat_template = (templates / "qwen3.jinja").read_text()
                tokenizer.save_pretrained(snapshot)
        reward_model = save_tiny_reward_model(folder / "reward-model")
        for name in REWARD_MODELS:
            placed.append(place_in_cache(Path(HF_HUB_CACHE), name, reward_model).parent.parent)
        yield
    finally:
        for path in placed:
            shutil.rmtree(path)


def place_in_cache(cache: Path, name: str, folder: str) -> Path:
    """A model's folder as the hub's cache has it."""
    commit = "0" * 40
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    return snapshot


@contextmanager
def hub_of_made_up_data() -> Iterator[None]:
    """`load_dataset` gives problems made from a seed, as GSM8K has them, for the data sets of the hub."""
    import datasets

    from trl_grpo_ext.tasks import load_arithmetic

    original = datasets.load_dataset

    def load(path: str, *positional: Any, split: str | None = None, **named: Any) -> Any:
        if path not in DATASETS:
            return original(path, *positional, split=split, **named)
        splits = {
            name: datasets.Dataset.from_list(
                [
                    {"question": row["prompt"][-1]["content"], "answer": f"So it is.\n#### {row['answer']}"}
                    for row in load_arithmetic("train" if name == "train" else "heldout", rows)
                ]
            )
            for name, rows in (("train", 32), ("test", 6))
        }
        return datasets.DatasetDict(splits) if split is None else splits[split]

    with patch.object(datasets, "load_dataset", load):
        yield
