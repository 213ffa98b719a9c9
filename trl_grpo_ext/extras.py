"""What is installed beside this package: scoring needs little of it, training the extra `train`. Imports no torch."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from .exits import stop


# What training needs: the extra `train`.
TRAIN = ("torch", "trl", "transformers", "datasets", "accelerate", "peft")
INSTALL_TRAIN = "pip install 'trl_grpo_ext[train]'"


class PackageMissingError(ImportError):
    """Something needs packages that are not installed; the message is one line and says how to have them."""


def missing_packages(packages: Sequence[str] = TRAIN) -> list[str]:
    """Those of these packages that are not installed."""
    return [name for name in packages if not _is_installed(name)]


def require(what: str, packages: Sequence[str] = TRAIN, install: str = INSTALL_TRAIN) -> None:
    """Raise unless packages are installed.

    Args:
        what (`str`):
            What needs them, for the message.
        packages (`Sequence[str]`, *optional*, defaults to those of the extra `train`):
            Names of packages, as they are imported.
        install (`str`, *optional*, defaults to `"pip install 'trl_grpo_ext[train]'"`):
            The command that installs them.

    Raises:
        PackageMissingError: If some are not installed; the message is one line.

    Example:
    ```python
    >>> require("adding", ["json", "no_sums"], install="pip install no_sums")
    Traceback (most recent call last):
    trl_grpo_ext.extras.PackageMissingError: adding needs no_sums, which is not installed: pip install no_sums
    ```
    """
    missing = missing_packages(packages)
    if missing:
        raise PackageMissingError(_message(what, missing, install))


def require_or_stop(program: str | None = None) -> None:
    """[`require`] what training needs, for the top of a script: ends it with one line and status 1.

    Args:
        program (`str`, *optional*):
            What the message calls the script. Default: its file.
    """
    try:
        require(Path(sys.argv[0]).name if program is None else program)
    except PackageMissingError as error:
        stop(1, error)


def _message(what: str, missing: Sequence[str], install: str) -> str:
    listed = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
    return f"{what} needs {listed}, which {'is' if len(missing) == 1 else 'are'} not installed: {install}"


def _is_installed(name: str) -> bool:
    if sys.modules.get(name) is not None:
        return True
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # a folder that happens to be called so has no origin


class _ExplainingLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except ModuleNotFoundError as error:
            missing = missing_packages()
            if not missing or (error.name or "").partition(".")[0] == __package__:
                raise
            # what is missing is one of them, or comes with one of them
            raise PackageMissingError(_message(module.__name__, missing, INSTALL_TRAIN)) from None


class _ExplainingFinder(MetaPathFinder):
    """Finds this package's modules as Python does; where one lacks a trainer's package, the error says what to do."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname.startswith(f"{__package__}.") else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _ExplainingLoader(spec.loader.name, spec.loader.path)
        return spec


def explain_missing_packages() -> None:
    """Where a trainer's package is missing, let imports of this package's modules say how to install it."""
    if missing_packages() and not any(isinstance(finder, _ExplainingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExplainingFinder())
