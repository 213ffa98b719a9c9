"""`trl-grpo-ext report`, called as the command calls it, and the report at the end of a script."""

import builtins
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from records import made_up_events, write_record

from trl_grpo_ext.cli.report import main
from trl_grpo_ext.report import page
from trl_grpo_ext.report.record import RECORD_FILE


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Without drawings, which take time and are tested elsewhere."""
    monkeypatch.setattr(page, "draw", lambda chart, width=0: "<svg></svg>")


def test_the_report_lies_beside_the_record(tmp_path, capsys):
    run = write_record(tmp_path / "run", steps=4)
    main([str(run)])
    assert capsys.readouterr().out == f"The report is in {run / 'report.html'}\n"
    assert "<h1>run " in (run / "report.html").read_text()


def test_of_several_runs_it_lies_in_the_folder_of_all(tmp_path, capsys, monkeypatch):
    runs = [write_record(tmp_path / "outputs" / name, steps=4) for name in ("one", "other")]
    monkeypatch.chdir(tmp_path)
    main([str(run) for run in runs])
    assert capsys.readouterr().out == f"The report is in {os.path.join('outputs', 'report.html')}\n"
    assert "2 runs compared" in (tmp_path / "outputs" / "report.html").read_text()


def test_output_names_the_file(tmp_path, capsys):
    run, file = write_record(tmp_path / "run", steps=4), tmp_path / "page.html"
    main([str(run / RECORD_FILE), "--output", str(file)])
    assert str(file) in capsys.readouterr().out
    assert file.exists()
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{folder}/nowhere"], 1, "has no record.jsonl"),
        (["{folder}/empty"], 1, "is no record of a run"),
        (["{folder}/run", "{folder}/run/../run"], 2, "is named twice"),
        (["{folder}/run"] + [f"{{folder}}/{number}" for number in range(12)], 2, "at most 12 runs, got 13"),
        (["{folder}/run", "--output", "{folder}"], 2, "is a folder"),
        (["{folder}/run", "--output", ""], 2, "name is missing"),
        (["{folder}/run", "--output", "{folder}/nowhere/report.html"], 1, "there is no folder"),
        (["{folder}/run", "--output", "{folder}/run/record.jsonl"], 2, "would be overwritten"),
        (["{folder}/run", "--otput", "x.html"], 2, "otput"),
        ([], 2, "RUN"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, status, message):
    run = write_record(tmp_path / "run", steps=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / RECORD_FILE).write_text("{}\n")
    record = (run / RECORD_FILE).read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(folder=tmp_path) for argument in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == status
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert (run / RECORD_FILE).read_bytes() == record
    assert not (run / "report.html").exists()


@pytest.fixture(params=["matplotlib", "jinja2"])
def missing_package(request, monkeypatch):
    import_module = builtins.__import__

    def fail(name, *arguments, **options):
        if name.partition(".")[0] == request.param:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    return request.param


def test_a_missing_package_is_named(tmp_path, capsys, missing_package):
    run = write_record(tmp_path / "run", steps=2)
    with pytest.raises(SystemExit) as stopped:
        main([str(run)])
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.count("\n") == 1
    assert missing_package in error
    assert "pip install 'trl_grpo_ext[page]'" in error


def trainer_of(folder):
    return SimpleNamespace(args=SimpleNamespace(output_dir=str(folder)))


def test_a_script_says_where_its_report_is(tmp_path, capsys):
    from trl_grpo_ext.script import write_report

    run = write_record(tmp_path / "run", steps=2)
    assert write_report(trainer_of(run)) == run / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"The report is in {run / 'report.html'}"


def test_a_missing_package_ends_no_run(tmp_path, capsys, missing_package):
    from trl_grpo_ext.script import write_report

    assert write_report(trainer_of(write_record(tmp_path / "run", steps=2))) is None
    assert "pip install 'trl_grpo_ext[page]'" in capsys.readouterr().err


def test_nothing_that_goes_wrong_with_a_report_ends_a_run(tmp_path, capsys, monkeypatch):
    from trl_grpo_ext.script import write_report

    assert write_report(trainer_of(tmp_path / "nowhere")) is None
    monkeypatch.setattr(page, "render", lambda runs: 1 / 0)
    assert write_report(trainer_of(write_record(tmp_path / "run", made_up_events(2)))) is None
    assert capsys.readouterr().err.count("note: ") == 2


def test_making_a_report_imports_no_torch(tmp_path):
    run = write_record(tmp_path / "run", steps=2)
    code = (
        "import contextlib, sys\n"
        "from trl_grpo_ext.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['report', '--help'])\n"
        f"main(['report', {str(run)!r}])\n"
        "print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "trl-grpo-ext report outputs/run outputs/other" in result.stdout
    assert result.stdout.splitlines()[-1] == "False False"
    assert (run / "report.html").exists()
