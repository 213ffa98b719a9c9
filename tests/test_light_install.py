"""Without torch and TRL: scoring works as it does beside them, and what needs them says how to install it."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import light
import pytest
from packaging.requirements import Requirement

from trl_grpo_ext.extras import TRAIN
from trl_grpo_ext.plain_parser import PlainParser
from trl_grpo_ext.tasks import load_problems, read_problems


ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "trl_grpo_ext").rglob("*.py")
    if file.name != "__main__.py"
)
INSTALL = "pip install 'trl_grpo_ext[train]'"
RIGHT = "<reasoning>\nr\n</reasoning>\n<answer>\n5\n</answer>\n"
LIGHT_COMMANDS = ("audit", "compare", "grade", "report", "score")


def run_light(tasks, folder):
    # a terminal's width is that of pytest's; no start-up file of a tool that measures coverage
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "light.py")],
        input=json.dumps(tasks),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_commands_do_the_same_without_a_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": str(n), "prompt": "q", "completion": RIGHT if n else "<answer>6</answer>", "answer": "5"}
        for n in range(4)
    ]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("b.jsonl").write_text("".join(json.dumps({**row, "completion": "5"}) + "\n" for row in rows))
    Path("train.jsonl").write_text(json.dumps({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}) + "\n")
    Path("named.csv").write_text("task,result\n2 + 3?,5\n3 + 3?,six\n")
    Path("run.yaml").write_text("bundle: gsm8k\n")
    Path("wrong.yaml").write_text("bundel: gsm8k\n")
    Path("list.yaml").write_text("- 1\n")
    commands = [
        *([command, "--help"] for command in LIGHT_COMMANDS),
        ["score", "a.jsonl", "--bundle", "gsm8k", "--output", "scores.jsonl"],
        ["score", "a.jsonl", "--config", "run.yaml"],
        ["score", "a.jsonl", "--config=wrong.yaml", "--bundle", "tag"],
        ["score", "a.jsonl", "--config", "list.yaml"],
        ["score", "a.jsonl", "--config", "nowhere.yaml"],
        ["score", "a.jsonl"],
        ["score", "a.jsonl", "--bundel", "tag", "--bundle", "tag"],
        ["grade", "a.jsonl", "--output", "figures.json", "--lines", "lines.jsonl"],
        ["grade", "a.jsonl", "--seed", "two"],
        ["grade", "a.jsonl", "--seed", "-2"],
        ["compare", "a.jsonl", "b.jsonl", "--ignore-prompts"],
        ["compare", "a.jsonl", "b.jsonl", "--ignore_prompts", "perhaps"],
        ["compare", "a.jsonl", "b.jsonl", "--convention", "strickt"],
        ["audit", "train.jsonl", "--bundle", "gsm8k"],
        ["audit", "named.csv", "--question_column", "task", "--answer_column", "result", "--failures", "1"],
        ["audit", "named.csv", "--answer_extractor", "hush"],
        ["audit", "nowhere.jsonl"],
    ]
    outputs = ("scores.jsonl", "figures.json", "lines.jsonl")
    with_trainer = [light.call(command) for command in commands]
    written = [Path(name).read_text() for name in outputs]
    for name in outputs:
        Path(name).unlink()
    for command, expected, found in zip(commands, with_trainer, run_light(commands, tmp_path), strict=True):
        assert found == expected, command
    assert [Path(name).read_text() for name in outputs] == written


def test_what_needs_a_trainer_says_how_to_install_it(tmp_path):
    (tmp_path / "accelerate").mkdir()  # a folder is no package
    commands = [
        ["grpo", "--help"],
        ["launch", "script.py"],
        ["doctor"],
        ["evaluate", "--model_name_or_path", "embedded", "--dataset_name", "arithmetic"],
        ["score", "a.jsonl", "--bundle", "accuracy_reward"],
        ["audit", "openai/gsm8k"],
        ["report", "."],
    ]
    Path(tmp_path / "a.jsonl").write_text("{}\n")
    *found, module = run_light([*commands, "trl_grpo_ext.config"], tmp_path)
    statuses = [result["status"] for result in found]
    assert statuses == [1, 1, 1, 1, 2, 2, 1]
    for command, result in zip(commands, found, strict=True):
        assert result["out"] == "", command
        assert result["error"].startswith("error: ")
        assert result["error"].count("\n") == 1
        assert "pip install " in result["error"]
    for result in found[:5]:
        assert INSTALL in result["error"]
        assert all(package in result["error"] for package in TRAIN)
    assert "pip install datasets" in found[5]["error"]
    assert "trl_grpo_ext[page]" in found[6]["error"]
    assert module[0] == "PackageMissingError"
    assert module[1].startswith("trl_grpo_ext.config needs torch, trl, ")
    assert module[1].endswith(INSTALL)


def test_every_module_is_there_or_says_what_it_lacks(tmp_path):
    found = dict(zip(MODULES, run_light(MODULES, tmp_path), strict=True))
    for module, error in found.items():
        assert error is None or (error[0] == "PackageMissingError" and INSTALL in error[1]), (module, error)
    there = {module for module, error in found.items() if error is None}
    assert {module for module in MODULES if module.startswith(("trl_grpo_ext.rewards", "trl_grpo_ext.tasks"))} <= there
    assert {f"trl_grpo_ext.cli.{command}" for command in LIGHT_COMMANDS} <= there
    assert "trl_grpo_ext.trainer" not in there


@pytest.mark.parametrize("file", ["recipes/gsm8k.py", "scripts/plan_memory.py", "trl_grpo_ext/grpo.py"])
def test_scripts_end_with_one_line(tmp_path, file):
    code = (
        "import runpy, sys, light; sys.meta_path.insert(0, light.NothingElse); sys.argv = [sys.argv[1]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
        if not file.startswith("trl_grpo_ext")
        else "import runpy, sys, light; sys.meta_path.insert(0, light.NothingElse)\n"
        "runpy.run_module('trl_grpo_ext.grpo', run_name='__main__')"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / file)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert INSTALL in result.stderr


def test_all_scripts_that_train_say_so_first():
    for file in [*(ROOT / "scripts").glob("*.py"), ROOT / "recipes" / "gsm8k.py"]:
        tree = ast.parse(file.read_text())
        order = [
            node.lineno
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            and (node.names[0].name if isinstance(node, ast.Import) else node.module or "").split(".")[0] in TRAIN
        ]
        checks = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("require_or_stop", "begin_script")
        ]
        assert not order or (checks and checks[0] < order[0]), file


def test_a_names_own_error():
    code = (
        "import sys, light; sys.meta_path.insert(0, light.NothingElse)\n"
        "try:\n    from trl_grpo_ext import GRPOExtTrainer\n"
        "except ImportError as error:\n    print(error)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("GRPOExtTrainer needs torch, trl, ")
    assert INSTALL in result.stdout


def test_rows_of_files_are_those_of_data_sets(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(
        json.dumps({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5", "id": "a"})
        + "\n"
        + json.dumps({"question": "2 + 4?", "answer": "#### 6"})
        + "\n"
    )
    for options in ({}, {"max_rows": 1}, {"with_example": True, "system_prompt": None}):
        assert read_problems(str(file), **options) == list(load_problems(str(file), **options))
        assert read_problems(str(tmp_path), **options) == list(load_problems(str(tmp_path), **options))
    assert read_problems("arithmetic", max_rows=3) == list(load_problems("arithmetic", max_rows=3))
    file.write_text("")
    for load in (read_problems, load_problems):
        with pytest.raises(ValueError, match="has no rows"):
            load(str(file))


# The plain parser against TRL's


@dataclass
class Options:
    text: str
    number: int = 3
    share: float | None = None
    count: int | None = 2
    names: list[str] = field(default_factory=list)
    sizes: list[int] | None = None
    is_quick: bool = False
    kind: str = field(default="a", metadata={"choices": ["a", "b"], "help": "One of two."})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--text", "none"],
        ["--text", "a", "--number", "4", "--share", "0.5", "--count", "None", "--is-quick"],
        ["--text=a", "--is_quick", "no", "--names", "a", "b", "--sizes", "1", "2", "--kind", "b"],
        ["--text", "a", "--share", "null", "--is_quick", "TRUE"],
        ["--config", "options.yaml"],
        ["--config", "options.yaml", "--text", "b", "--unknown", "1", "--count", "7"],
    ],
)
def test_the_plain_parser_parses_as_trls(tmp_path, monkeypatch, arguments):
    from trl import TrlParser

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_A_TEST", "0")
    Path("options.yaml").write_text("text: a\nshare: 1\nnames: [x]\nis_quick: true\nother: 5\nenv: {OF_A_TEST: 1}\n")
    parsed = []
    for kind in (TrlParser, PlainParser):
        options = {"return_remaining_strings": True, "separate_remaining_strings": True}
        parsed.append(kind([Options]).parse_args_and_config(arguments, **options))
        if "--config" in arguments:
            assert os.environ["OF_A_TEST"] == "1"
    assert parsed[0] == parsed[1]
    assert TrlParser([Options]).format_help() == PlainParser([Options]).format_help()


# What an install line gives


def all_of(extra, seen=()):
    """The packages of an extra, those of the extras that it names among them."""
    found = set()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras - set(seen):
                found |= all_of(other, (*seen, extra))
        else:
            found.add(requirement.name)
    return found


def test_install_lines_give_what_they_gave():
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert not core & {*TRAIN, "pyarrow", "pandas"}
    assert all_of("train") == set(TRAIN)
    for extra in ("report", "deepspeed", "test", "dev"):
        assert set(TRAIN) <= all_of(extra), extra
    assert {"jinja2", "matplotlib"} <= all_of("report") & all_of("dev")
    assert not all_of("page") & set(TRAIN)
    assert not all_of("math") & set(TRAIN)
