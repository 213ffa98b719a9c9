"""Private names of the libraries stand in `compat.py` alone, and its `SEAMS` are the members that mixins override."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from trl import GRPOTrainer

from trl_grpo_ext.compat import SEAMS


ROOT = Path(__file__).resolve().parent.parent
COMPAT = ROOT / "trl_grpo_ext" / "compat.py"
FILES = sorted(file for folder in ("trl_grpo_ext", "recipes", "scripts") for file in (ROOT / folder).rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def is_trainer(node: ast.ClassDef) -> bool:
    """Whether a class is one of TRL's trainers, or is put before one."""
    names = [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases]
    return any(name.endswith(("Trainer", "Mixin")) for name in names)


def assigned(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to."""
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign | ast.For | ast.NamedExpr) else []


def defined(tree: ast.AST) -> set[str]:
    """Private names of functions, classes, variables and attributes that the code itself makes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        for target in assigned(node):
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    found.add(part.id)
                elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                    found.add(part.attr)
    return {name for name in found if is_private(name)}


def members_of_trl() -> set[str]:
    """Private methods and attributes of TRL's trainer and of what it derives from."""
    classes = [cls for cls in GRPOTrainer.__mro__ if cls is not object]
    found = {name for cls in classes for name in vars(cls) if is_private(name)}
    for cls in classes:
        found |= defined(ast.parse(textwrap.dedent(inspect.getsource(cls))))
    return found


TREES = {file: ast.parse(file.read_text(), str(file)) for file in FILES}
OF_TRL = members_of_trl()
OWN = set().union(*map(defined, TREES.values())) | {file.stem for file in FILES if is_private(file.stem)}


@dataclass(frozen=True)
class Use:
    """A private name that is read, written, imported, overridden or called; `member`: of a trainer."""

    file: Path
    line: int
    name: str
    member: bool
    own: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.name}"


class Uses(ast.NodeVisitor):
    """Collects the private names of a file."""

    def __init__(self, file: Path, own: set[str]) -> None:
        self.file, self.own = file, own
        self.found: list[Use] = []
        self.classes: list[ast.ClassDef] = []
        self.standard: set[str] = set()  # names of modules of the standard library: `os._exit` is public

    @property
    def is_in_trainer(self) -> bool:
        return bool(self.classes) and is_trainer(self.classes[-1])

    def add(self, node: ast.AST, name: str, member: bool = False, own: bool = False) -> None:
        if is_private(name):
            self.found.append(Use(self.file, node.lineno, name, member, own))

    def add_attribute(self, node: ast.AST, owner: ast.expr, name: str) -> None:
        owner_name = getattr(owner, "id", None)
        is_super = isinstance(owner, ast.Call) and getattr(owner.func, "id", None) == "super"
        if owner_name in self.standard:
            return
        if self.is_in_trainer and (owner_name in ("self", "cls") or is_super):
            self.add(node, name, member=True, own=name in self.own - OF_TRL)
        elif self.classes and owner_name in ("self", "cls"):
            self.add(node, name, own=name in self.own)
        else:
            self.add(node, name, own=name in self.own - OF_TRL)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node)
        if is_trainer(node):
            for statement in node.body:
                names = [target.id for target in assigned(statement) if isinstance(target, ast.Name)]
                if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                    names.append(statement.name)
                for name in names:
                    self.add(statement, name, member=True, own=name not in OF_TRL)
        self.generic_visit(node)
        self.classes.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.add_attribute(node, node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr", "delattr") and len(node.args) > 1:
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.add_attribute(node, owner, name.value)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            parts = alias.name.split(".")
            if parts[0] in sys.stdlib_module_names:
                self.standard.add(alias.asname or parts[0])
            else:
                for part in parts:
                    self.add(node, part)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = (node.module or "").split(".")
        if node.level == 0 and parts[0] not in {*sys.stdlib_module_names, "trl_grpo_ext"}:
            for name in (*parts, *(alias.name for alias in node.names)):
                self.add(node, name)


def uses() -> Iterator[Use]:
    for file, tree in TREES.items():
        if file != COMPAT:
            visitor = Uses(file, OWN)
            visitor.visit(tree)
            yield from visitor.found


def listed(found: list[Use]) -> str:
    return "\n".join(map(str, sorted(found, key=lambda use: (use.file, use.line))))


def test_private_names_stand_in_compat_alone():
    strangers = [use for use in uses() if not use.own and not (use.member and use.name in SEAMS)]
    assert not strangers, (
        "private names of a library outside trl_grpo_ext/compat.py; give each a function there, or list a member that "
        f"a mixin overrides and calls through super() in its SEAMS:\n{listed(strangers)}"
    )


@pytest.mark.parametrize("seam", SEAMS)
def test_every_seam_is_trls_and_used(seam):
    assert hasattr(GRPOTrainer, seam), f"TRL's trainer has no {seam} any more"
    assert any(use.member and use.name == seam for use in uses()), f"no mixin overrides or calls {seam}: unlist it"


def test_what_the_search_finds():
    """Each way in which a private name can be used, and those that are our own."""
    tree = ast.parse(
        textwrap.dedent(
            """
            import os
            import torch._dynamo
            from transformers._names import public
            from torch.nn import _reduction
            from ._private_of_ours import anything
            os._exit(0)
            config._attn_implementation = getattr(module, "_is_stateful", None)
            class MyMixin(_GRPOTrainer):
                _tag_names = []
                def _compute_loss(self):
                    self._step += 1
                    return super()._prepare_inputs(self.__dict__)
            class Other:
                def _own(self):
                    return self._own()
            """
        )
    )
    visitor = Uses(Path("example.py"), defined(tree))
    visitor.visit(tree)
    found = {(use.line, use.name, use.member) for use in visitor.found if not use.own}
    assert found == {
        (3, "_dynamo", False),
        (4, "_names", False),
        (5, "_reduction", False),
        (8, "_attn_implementation", False),
        (8, "_is_stateful", False),
        (10, "_tag_names", True),
        (11, "_compute_loss", True),
        (12, "_step", True),
        (13, "_prepare_inputs", True),
    }
