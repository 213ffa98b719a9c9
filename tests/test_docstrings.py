import ast
import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from launch import load_script

import trl_grpo_ext


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(trl_grpo_ext.__file__).parent


def modules():
    """All modules of the package by their names, and the files that they are."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] != "__main__":
            yield ".".join(["trl_grpo_ext", *parts]).removesuffix(".__init__"), file


def is_public(name):
    return not any(part.startswith("_") for part in name.split("."))


class FencedExamples(doctest.DocTestParser):
    """Finds examples in blocks of Markdown, whose last line is no output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^[ ]*```.*$", "", string, flags=re.MULTILINE), name)


EXAMPLE_THAT_RUNS = re.compile(r"^\s*>>> (?!.*# doctest: \+SKIP)", re.MULTILINE)


@pytest.mark.parametrize("name", [name for name, file in modules() if EXAMPLE_THAT_RUNS.search(file.read_text())])
def test_examples(name):
    """What examples show comes out; their names are those of the module, and what they import."""
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    said: list[str] = []
    tests = doctest.DocTestFinder(parser=FencedExamples()).find(module, name)
    assert any(test.examples for test in tests)
    for test in tests:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_a_wrong_example_is_found():
    """The parser leaves the outputs in."""
    test = FencedExamples().get_doctest("Example:\n```python\n>>> 1 + 1\n3\n```\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(test, out=lambda said: None).failed == 1


def test_what_is_public_has_a_docstring():
    """But for commands, which say what they are when asked for help, and the doctor's rules, which have titles."""
    without = []
    for name, file in modules():
        tree = ast.parse(file.read_text())
        if not is_public(name) or name.startswith("trl_grpo_ext.cli"):
            continue
        without += [] if ast.get_docstring(tree) else [name]
        without += [
            f"{name}.{node.name}"
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
            and node.name != "main"
            and not any(ast.unparse(decorator).startswith("rule(") for decorator in node.decorator_list)
            and not ast.get_docstring(node)
        ]
    assert not without


def test_names_that_are_looked_up_later_are_in_the_pages():
    pytest.importorskip("pdoc")
    build_docs = load_script(ROOT / "scripts" / "build_docs.py")
    for name in trl_grpo_ext.__all__:
        module, qualname = build_docs.find(name, trl_grpo_ext)
        assert inspect.getdoc(getattr(sys.modules[module], qualname))
    with pytest.raises(LookupError):
        build_docs.find("no_such_name", trl_grpo_ext)


@pytest.mark.slow
def test_api_pages_without_a_warning(tmp_path):
    """Each module has a page, in which references are links; a warning, or a reference to nothing, is an error."""
    pytest.importorskip("pdoc")
    build_docs = load_script(ROOT / "scripts" / "build_docs.py")
    build_docs.build(tmp_path)
    public = [name for name, _ in modules() if is_public(name)]
    assert {name.replace(".", "/") + ".html" for name in public} | {"index.html"} == {
        str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.html")
    }
    page = (tmp_path / "trl_grpo_ext" / "trainer.html").read_text()
    assert 'href="config.html#GRPOExtConfig"' in page
    assert "[`" not in page.replace("<code>", "`").replace("</code>", "`").split("<input id=")[0]
    link_in_link = re.compile(r"<a [^>]*><code><a ")
    assert not [file for file in tmp_path.rglob("*.html") if link_in_link.search(file.read_text())]
    assert 'id="GRPOExtTrainer"' in (tmp_path / "trl_grpo_ext.html").read_text()
