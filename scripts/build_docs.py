"""Build the pages of the API documentation from docstrings, with pdoc.

    python scripts/build_docs.py                # writes outputs/docs
    python scripts/build_docs.py --output_dir docs

pdoc reads Markdown and Google's sections. What docstrings here have beside these is TRL's: [`Name`] for a reference,
which is made a link, and "Example:" above a block of code. A reference to something that is not there is an error.
"""

import argparse
import importlib
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import jinja2
import pdoc.doc
import pdoc.render
import pdoc.render_helpers

import trl_grpo_ext


ADDRESS = re.compile(r"(?<![<`'\"\w(/])https?://[^\s)>`'\"]*[\w/]|(?<=[^\]]\()https?://[^\s)>`'\"]*[\w/]")  # bare ones
OUTPUT = Path(__file__).resolve().parent.parent / "outputs" / "docs"
REFERENCE = re.compile(r"\[`~?([\w.]+)(?:\(\))?`\]")


def public_modules() -> list[str]:
    """The names of the package and of all its modules without an underscore in front."""
    found = pkgutil.walk_packages(trl_grpo_ext.__path__, "trl_grpo_ext.")
    names = [module.name for module in found]
    return ["trl_grpo_ext", *(name for name in names if not any(part.startswith("_") for part in name.split(".")))]


def find(name: str, module: ModuleType) -> tuple[str, str]:
    """Where that is documented which a docstring of a module means by a name: the module, and the name in it.

    It may be a dotted name, one that the module knows, a member of one of its classes, or one that a single module of
    the package defines.

    Raises:
        LookupError: If there is nothing of that name.
    """
    first, _, rest = name.partition(".")
    if name in sys.modules:
        return name, ""
    owner, _, last = name.rpartition(".")
    if hasattr(sys.modules.get(owner), last):
        return home_of(getattr(sys.modules[owner], last), owner, last)
    for place in [module, *(sys.modules[other] for other in public_modules() if other in sys.modules)]:
        if hasattr(place, first) and not (rest and not has_member(getattr(place, first), rest)):
            home, qualname = home_of(getattr(place, first), place.__name__, first)
            return home, f"{qualname}.{rest}".strip(".")
    for found in vars(module).values():
        if isinstance(found, type) and found.__module__.startswith("trl_grpo_ext") and has_member(found, name):
            return found.__module__, f"{found.__qualname__}.{name}"
    raise LookupError(name)


def has_member(found: Any, name: str) -> bool:
    return hasattr(found, name) or name in getattr(found, "__annotations__", {})


def home_of(found: Any, module: str, name: str) -> tuple[str, str]:
    """The module of a class or a function, and its name there; of anything else, where it was found."""
    if isinstance(found, ModuleType):
        return found.__name__, ""
    if isinstance(found, type | FunctionType):
        return found.__module__, found.__qualname__
    return module, name


@jinja2.pass_context
def to_markdown(context: jinja2.runtime.Context, docstring: str) -> str:
    """Markdown of a docstring in TRL's format, where pdoc has a filter for that of Google's."""
    page = getattr(context.get("module"), "modulename", None)

    def link(match: re.Match[str]) -> str:
        name = match[1]
        short = name.rpartition(".")[2] if match[0].startswith("[`~") else name
        if page is None:  # what is on no module's page
            return f"`{short}`"
        try:
            owner, qualname = find(name, sys.modules[page])
        except LookupError:
            warnings.warn(f"{page}: a docstring refers to {name}, which is not there", stacklevel=2)
            return f"`{short}`"
        if short == name and name.startswith("trl_grpo_ext."):  # pdoc makes a link of it; no link stands in a link
            return f"`{name}`"
        if owner not in context["all_modules"] or any(part.startswith("_") for part in qualname.split(".")):
            return f"`{short}`"
        address = pdoc.render_helpers.relative_link(page, owner)
        return f"[`{short}`]({address}{'#' * bool(qualname)}{qualname})"

    docstring = REFERENCE.sub(link, ADDRESS.sub(r"<\g<0>>", docstring))
    docstring = re.sub(r"^Examples?:\n+(?=```)", "###### Example:\n\n", docstring, flags=re.MULTILINE)
    return pdoc.render_helpers.to_markdown_with_context(context, docstring)


def import_all() -> dict[str, ModuleType]:
    """The modules by their names, with what they look up when it is first used, and with their submodules' names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of others, when they are imported
        modules = {name: importlib.import_module(name) for name in public_modules()}
    for module in modules.values():
        for name in getattr(module, "__all__", ()):
            setattr(module, name, getattr(module, name))
    for name in modules:
        parent, _, last = name.rpartition(".")
        if hasattr(modules.get(parent), "__all__"):  # of these, pdoc lists what they name
            vars(modules[parent])["__all__"] = [*vars(modules[parent])["__all__"], last]
    return modules


def build(folder: Path) -> None:
    """Write the pages; a warning is raised as an error."""
    modules = {name: pdoc.doc.Module(module) for name, module in import_all().items()}
    pdoc.render.configure(docformat="google", footer_text=f"trl_grpo_ext {trl_grpo_ext.__version__}")
    pdoc.render.env.filters["to_markdown"] = to_markdown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of types of packages that are not installed, and those that TRL imports for type checkers alone, pdoc shows
        # the names.
        warnings.filterwarnings("ignore", message="Error parsing type annotation|Failed to run TYPE_CHECKING")
        pages = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(modules[name], modules) for name in modules}
        pages |= {"index.html": pdoc.render.html_index(modules), "search.js": pdoc.render.search_index(modules)}
    for name, content in pages.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, help="Folder for the pages.")
    folder = parser.parse_args(argv).output_dir
    build(folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main(sys.argv[1:])
