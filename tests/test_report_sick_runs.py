"""Runs of the embedded policy that are really made sick: the doctor names what is wrong, once, while they go on.

`scripts/check_doctor.py` has the runs, and makes some that take longer.
"""

import logging
from pathlib import Path

import pytest
from launch import load_script

from trl_grpo_ext.report.doctor import PROBLEM, RULES, diagnose
from trl_grpo_ext.report.record import read_record


check_doctor = load_script(Path(__file__).resolve().parent.parent / "scripts" / "check_doctor.py")
SEVERITY = {rule.name: rule.severity for rule in RULES}
QUICK = ("8 tokens",)
MOST_STEPS = 12
CASES = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name, run in check_doctor.SICK.items()
    if run.by_step <= MOST_STEPS
]


@pytest.mark.parametrize("name", CASES)
def test_a_sick_run_is_named_while_it_goes_on(name, tmp_path, caplog):
    run = check_doctor.SICK[name]
    with caplog.at_level(logging.INFO, logger="trl_grpo_ext"):
        findings = check_doctor.train(tmp_path, run)
    (event,) = [event for event in findings if event.rule == run.rule and event.holds][:1]
    assert event.step <= run.by_step
    said = [record for record in caplog.records if record.getMessage() == f"doctor: {event.message}"]
    assert [record.levelno for record in said] == [logging.WARNING if SEVERITY[run.rule] == PROBLEM else logging.INFO]
    warned = [record.getMessage() for record in caplog.records if record.getMessage().startswith("doctor: ")]
    assert len(warned) == len(set(warned))
    # afterwards, from the file
    assert run.rule in {finding.rule for finding in diagnose(read_record(tmp_path))}


@pytest.mark.slow
def test_a_run_that_is_not_to_be_diagnosed(tmp_path, caplog):
    run = check_doctor.Sick("", 4, {"max_completion_length": 8, "diagnose": False})
    assert check_doctor.train(tmp_path, run) == []
    assert "doctor" not in caplog.text
    assert [finding.rule for finding in diagnose(read_record(tmp_path))] == ["truncated-completions"]


@pytest.mark.slow
def test_a_diagnosis_that_fails_ends_neither_the_run_nor_its_record(tmp_path, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("a rule with a bug")

    monkeypatch.setattr("trl_grpo_ext.report.watch.holding", fail)
    check_doctor.train(tmp_path, check_doctor.Sick("", 3, {"max_completion_length": 8}))
    assert caplog.text.count("a rule with a bug") == 1
    run = read_record(tmp_path)
    assert run.last_step == 3
    assert run.end is not None


@pytest.mark.slow
def test_the_healthy_demo_has_no_problem_in_its_first_steps(tmp_path):
    findings = check_doctor.train(tmp_path, check_doctor.Sick("", 15))
    assert [event for event in findings if SEVERITY[event.rule] == PROBLEM] == []
