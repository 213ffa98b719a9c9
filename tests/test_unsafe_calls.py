"""No code of ours runs what a file says: no pickle, eval, exec, unsafe YAML, or loader that unpickles."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(file for folder in ("trl_grpo_ext", "recipes", "scripts") for file in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# Methods that run code which stands in what they are given, by the last part of the name
CALLS = {"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "read_pickle"}

# file -> what is found there -> why it may stay
ALLOWED = {
    "trl_grpo_ext/checkpoints.py": {"import pickle": "the name of its error"},
    "trl_grpo_ext/evaluation/policies.py": {"import pickle": "the name of its error"},
    "trl_grpo_ext/weights_only.py": {"import pickle": "an unpickler that knows a list of weights alone"},
}


def name_of(node: ast.AST) -> str:
    """A dotted name as it is written; what is no name in it is left out."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unsafe(tree: ast.AST) -> set[str]:
    """What of a file could run what it reads."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {f"import {item.name}" for item in node.names if item.name.partition(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] in MODULES and not node.level:
                found.add(f"import {module}")
            found |= {f"{module}.{item.name}" for item in node.names if f"{module}.{item.name}" in ("torch.load",)}
            found |= {f"{module}.{item.name}" for item in node.names if module == "yaml" and "oad" in item.name} - {
                "yaml.safe_load"
            }
        elif isinstance(node, ast.Call):
            found |= unsafe_call(node)
    return found


def unsafe_call(node: ast.Call) -> set[str]:
    name = name_of(node.func)
    last = name.rpartition(".")[2]
    keywords = {item.arg: item.value for item in node.keywords}
    found = set()
    if name in BUILTINS or last in CALLS:
        found.add(name)
    if name in ("yaml.load", "yaml.load_all"):
        loader = name_of(keywords.get("Loader") or (node.args[1] if len(node.args) > 1 else node.func))
        if loader.rpartition(".")[2] not in ("SafeLoader", "CSafeLoader"):
            found.add(name)
    if name in ("torch.load", "torch.jit.load", "torch.hub.load") and not is_constant(
        keywords.get("weights_only"), True
    ):
        found.add(name)
    for keyword, safe in (("allow_pickle", False), ("trust_remote_code", False), ("weights_only", True)):
        value = keywords.get(keyword)
        if isinstance(value, ast.Constant) and value.value is not safe:
            found.add(f"{keyword}={value.value}")
    if is_constant(keywords.get("shell"), True) or name in ("os.system", "os.popen"):
        found.add(f"{name} in a shell")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_is_run(file):
    allowed = ALLOWED.get(file.relative_to(ROOT).as_posix(), {})
    assert unsafe(ast.parse(file.read_text())) == set(allowed)


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "import joblib.x", "import marshal, shelve", "import dill"),
        *("eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__(name)"),
        *("yaml.load(text)", "yaml.load(text, Loader=yaml.FullLoader)", "yaml.unsafe_load(text)", "yaml.full_load(t)"),
        *("from yaml import unsafe_load", "from yaml import load"),
        *("torch.load(file)", "torch.load(file, weights_only=False)", "torch.load(file, weights_only=flag)"),
        *("from torch import load", "torch.hub.load(name)", "accelerator.load(file, weights_only=False)"),
        *("np.load(file, allow_pickle=True)", "pandas.read_pickle(file)", "f(name, trust_remote_code=True)"),
        *("subprocess.run(text, shell=True)", "os.system(text)"),
    ],
)
def test_what_is_looked_for_is_found(code):
    assert unsafe(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        *("re.compile(text)", "torch.load(file, weights_only=True)", "yaml.safe_load(text)", "np.load(file)"),
        *("yaml.load(text, Loader=yaml.CSafeLoader)", "from yaml import YAMLError", "f(trust_remote_code=asked_for)"),
        *("json.load(file)", "model.eval()", "from .pickle import x"),
    ],
)
def test_what_is_safe_is_not_found(code):
    assert not unsafe(ast.parse(code))
