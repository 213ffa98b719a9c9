import json
import re
from pathlib import Path

import pytest
from launch import load_script


jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, NOTEBOOK = (ROOT / "recipes" / f"walkthrough{suffix}" for suffix in (".py", ".ipynb"))
STATED = re.compile(r"\*\*([+-]?\d[\d.,]*\d|\d)\*\*")  # numbers in bold
MAX_BYTES = 1_000_000


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell):
    """What a cell of code shows as text: what it prints, and tables."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", ())]
    return "".join(texts)


def test_script_and_notebook_have_the_same_cells(stored):
    script = jupytext.read(SCRIPT)
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in stored.cells
    ]


def test_what_is_stored(stored):
    """Each cell of code has run, in order and without an error; nothing tells of the machine, and it is small."""
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 7
    texts = json.dumps([cell for cell in stored.cells if cell.cell_type == "markdown"]) + "".join(map(printed, code))
    assert not re.search(r"(?<![\w.:/])/(?:\w+/)+\w+|site-packages|Traceback|WARNING", texts.replace("https://", ""))
    assert NOTEBOOK.stat().st_size < MAX_BYTES


def stated_numbers(cells):
    """Each number that the text states in bold, with what the cells of code before and behind it show."""
    for index, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            shown = " ".join(
                printed(near) for near in cells[max(0, index - 1) : index + 2] if near.cell_type == "code"
            )
            for number in STATED.findall(cell.source):
                yield number, shown


def is_shown(number, text):
    return re.search(rf"(?<![\d.+-]){re.escape(number)}(?![\d.]*\d)", text) is not None


def test_numbers_of_the_text_are_computed(stored):
    numbers = list(stated_numbers(stored.cells))
    assert len(numbers) >= 20
    assert not [number for number, shown in numbers if not is_shown(number, shown)]


def test_a_number_that_is_not_computed_is_found():
    assert is_shown("0.253", "norm 0.253\n")
    assert is_shown("-0.9354", "-0.9354  +0.9354")
    assert not is_shown("0.25", "norm 0.253\n")
    assert not is_shown("1.4", "ratio 21.4")


@pytest.mark.slow
def test_it_runs(stored, tmp_path):
    """Its arithmetic comes out as it is stored; the policy learns, and writes a report."""
    again = load_script(ROOT / "scripts" / "build_walkthrough.py").run_notebook(tmp_path)
    (training,) = (index for index, cell in enumerate(again.cells) if "GRPOExtTrainer(" in cell.source)
    assert [printed(cell) for cell in again.cells[:training]] == [printed(cell) for cell in stored.cells[:training]]
    before, after = map(int, re.findall(r"right answers \w+: (\d+)%", printed(again.cells[training])))
    assert after > before + 30
    assert (tmp_path / "outputs" / "walkthrough" / "report.html").stat().st_size < 3_000_000
