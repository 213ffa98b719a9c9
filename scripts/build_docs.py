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
from types import ModuleType
from typing import Any

import jinja2
import pdoc.doc
import pdoc.render
import pdoc.render_helpers

import trl_grpo_ext


OUTPUT = Path(__file__).resolve().parent.parent / "outputs" / "docs"
REFERENCE = re.compile(r"\[`~?([\w.]+)(?:\(\))?`\]")


def public_modules() -> list[str]:
    """The names of the package and of all its modules without an underscore in front."""
    found = pkgutil.walk_packages(trl_grpo_ext.__path__, "trl_grpo_ext.")
    names = [module.name for module in found]
    return ["trl_grpo_ext", *(name for name in names if not any(part.startswith("_") for part in name.split(".")))]


def resolve(name: str, module: ModuleType, within: str = "") -> Any:
    """What a docstring of a module, or of a class in it, means by a name, dotted or not.

    Raises:
        LookupError: If there is nothing of that name.
    """
    for start in (within, ""):
        found: Any = module
        try:
            for part in [*start.split("."), *name.split(".")]:
                found = getattr(found, part) if part else found
            return found
        except AttributeError:
            pass
    for end in range(name.count(".") + 1, 0, -1):
        parts = name.split(".")
        try:
            found = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError):
            pass
    raise LookupError(name)


def place_of(name: str, found: Any, module: ModuleType) -> tuple[str, str]:
    """The module in which something is documented, and its name there."""
    if isinstance(found, ModuleType):
        return found.__name__, ""
    of_class = getattr(found, "fget", found)  # a property has its getter's name
    if hasattr(of_class, "__qualname__") and getattr(of_class, "__module__", None):
        return of_class.__module__, of_class.__qualname__
    owner, _, attribute = name.rpartition(".")
    return (owner, attribute) if owner in sys.modules else (module.__name__, name)


@jinja2.pass_context
def to_markdown(context: jinja2.runtime.Context, docstring: str) -> str:
    """Markdown of a docstring in TRL's format, where pdoc has a filter for that of Google's."""
    page = context["module"].modulename
    module = sys.modules[page]

    def link(match: re.Match[str]) -> str:
        name = match[1]
        try:
            owner, qualname = place_of(name, resolve(name, module), module)
        except LookupError:
            warnings.warn(f"{page}: a docstring refers to `{name}`, which is not there", stacklevel=2)
            return f"`{name}`"
        short = name.rpartition(".")[2] if match[0].startswith("[`~") else name
        if owner not in context["all_modules"] or any(part.startswith("_") for part in qualname.split(".")):
            return f"`{short}`"
        address = pdoc.render_helpers.relative_link(page, owner)
        return f"[`{short}`]({address}{'#' * bool(qualname)}{qualname})"

    docstring = REFERENCE.sub(link, docstring)
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
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if hasattr(modules.get(parent), "__all__"):  # of these, pdoc lists what they name
            modules[parent].__all__ = [*modules[parent].__all__, last]
    return modules


def build(folder: Path) -> None:
    """Write the pages; a warning is raised as an error."""
    modules = {name: pdoc.doc.Module(module) for name, module in import_all().items()}
    pdoc.render.configure(docformat="google", footer_text=f"trl_grpo_ext {trl_grpo_ext.__version__}")
    pdoc.render.env.filters["to_markdown"] = to_markdown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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
