"""`trl-grpo-ext audit`, called as the command calls it."""

import json

import pytest

from trl_grpo_ext.cli.audit import main


GOOD = {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    shown = capsys.readouterr()
    return stopped.value.code, shown.out, shown.err


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_references_with_full_marks(tmp_path, capsys):
    status, shown, _ = run(capsys, write(tmp_path / "train.jsonl", GOOD, GOOD))
    assert status == 0
    assert "2 of 2 references get full marks" in shown
    assert "format_reward_func" in shown
    assert run(capsys, tmp_path, "--bundle", "gsm8k", "--split", "train")[0] == 0


def test_references_without_full_marks(tmp_path, capsys):
    file = write(tmp_path / "train.jsonl", {"question": "q", "answer": "#### x = 1,080"}, GOOD)
    status, shown, _ = run(capsys, file, "--bundle", "gsm8k")
    assert status == 1
    assert "row 0: int_reward_func 0 of 0.5, answer 'x = 1,080'" in shown
    assert "1 of the references in 'answer' are no plain numbers" in shown
    assert "1 of 2 references get full marks" in shown
    assert "row 0" not in run(capsys, file, "--bundle", "gsm8k", "--failures", "0")[1].split("warning")[0]


def test_columns_and_rewards_of_somebodys_own(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("task,result\nOne?,1\nTwo?,two\n")
    options = ["--question_column", "task", "--answer_column", "result"]
    bundle = ["--bundle", "trl_grpo_ext.rewards.int_reward_func"]
    status, shown, _ = run(capsys, tmp_path / "p.csv", *options, *bundle)
    assert status == 1
    assert "row 1: int_reward_func 0 of 0.5, answer 'two'" in shown
    assert "1 of 2 references get full marks" in shown


RULES = """
from trl_grpo_ext.rewards import *

THINK = RewardBundle(
    [get_correctness_reward(answer_extractor=("think", "boxed")), get_format_reward(sections=["think"])]
)
WORKING_OUT = tag_bundle(tags=(("<start>", "<end>"), ("<SOLUTION>", "</SOLUTION>")))
OPENED = RewardBundle(
    [get_correctness_reward(answer_tag=("Answer:", "")), get_strict_format_reward(sections=["plan", ("Answer:", "")])]
)
BOXED = RewardBundle([get_correctness_reward(answer_extractor="boxed")])
"""


@pytest.mark.parametrize("name", ["THINK", "WORKING_OUT", "OPENED", "BOXED"])
def test_references_in_the_format_of_the_rewards(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules_of_mine.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    for row in (GOOD, {"question": "q", "answer": "2"}):
        rows = write(tmp_path / "a.jsonl", row, row)
        status, shown, _ = run(capsys, rows, "--bundle", f"rules_of_mine.{name}")
        assert (status, "2 of 2 references get full marks" in shown) == (0, True), shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{file}"], "train.jsonl, line 2: the answer has no '####'"),
        (["nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["{file}", "--bundle", "gms8k"], "--bundle: gms8k: there is no reward"),
        (["{file}", "--answer_extractor", "latex"], "invalid choice: 'latex'"),
        (["{file}", "--failures", "-1"], "--failures must not be negative, got -1"),
        ([], "the following arguments are required: dataset"),
        (["{file}", "--bundel", "tag"], "did you mean --bundle?"),
    ],
)
def test_what_cannot_be_audited_is_one_line(tmp_path, capsys, arguments, message):
    file = write(tmp_path / "train.jsonl", GOOD, {"question": "q", "answer": "2"})
    status, shown, error = run(capsys, *(argument.format(file=file) for argument in arguments))
    assert status == 2
    assert shown == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
