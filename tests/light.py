"""Runs in a process of its own, in which nothing can be imported but Python, this package and what its core requires.

Reads a JSON list from standard input: command lines of `trl-grpo-ext` (a list each), or modules (a text each). Writes,
for each, what it printed, its status, and which error an import ended with.
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module


# The core's requirements, and what these require
ALLOWED = {"trl_grpo_ext", "numpy", "yaml", "_yaml", "rich", "tqdm", "markdown_it", "mdurl", "pygments"}


class NothingElse:
    """Finds no package that is not in the core."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def call(arguments):
    from trl_grpo_ext.cli import main

    out, error, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            main(arguments)
        except SystemExit as stopped:
            status = stopped.code or 0
    return {"out": out.getvalue(), "error": error.getvalue(), "status": status}


def load(name):
    try:
        import_module(name)
    except ImportError as error:
        return [type(error).__name__, str(error)]
    return None


if __name__ == "__main__":
    # what an environment's start-up files have imported already
    for loaded in [name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names | ALLOWED]:
        if loaded != "__main__":
            del sys.modules[loaded]
    sys.meta_path.insert(0, NothingElse)
    tasks = json.load(sys.stdin)
    json.dump([load(task) if isinstance(task, str) else call(task) for task in tasks], sys.stdout)
