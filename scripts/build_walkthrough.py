"""Run the walkthrough and store its outputs: recipes/walkthrough.ipynb from recipes/walkthrough.py, 1 to 2 minutes.

python scripts/build_walkthrough.py
"""

import re
import tempfile
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbformat import NotebookNode


SCRIPT = Path(__file__).resolve().parent.parent / "recipes" / "walkthrough.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
# What DeepSpeed prints where it is installed and there is no GPU
NO_NEWS = re.compile(r"^.*\[real_accelerator\.py:.*\n+", re.MULTILINE)


def run_notebook(folder: str | Path) -> NotebookNode:
    """The walkthrough with the outputs of its cells, which run in a folder.

    Of what programs write to the standard error stream (progress, and where packages are) nothing is kept. Cells are
    numbered, and do not have random names, so that the same outputs give the same file.
    """
    notebook = jupytext.read(SCRIPT)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}}).execute()
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("metadata", {}).pop("needs_background", None)  # its pictures can be read on any background
                if "text" in output:
                    output["text"] = NO_NEWS.sub("", output["text"])
            cell.outputs = [output for output in cell.outputs if output.get("text", "something")]
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        jupytext.write(run_notebook(folder), NOTEBOOK)


if __name__ == "__main__":
    main()
