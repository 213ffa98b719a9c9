import json
import subprocess
import sys
from pathlib import Path

import pytest

from trl_grpo_ext.rewards import audit, get_correctness_reward, gsm8k_bundle, tag_bundle
from trl_grpo_ext.tasks import format_solution, load_arithmetic


ROOT = Path(__file__).resolve().parent.parent


def row(solution, answer):
    return {"prompt": "q", "answer": answer, "solution": solution}


def test_good_references_pass():
    report = audit(tag_bundle(), load_arithmetic("train", 64))
    assert report.ok
    assert report.rows == report.rows_with_full_marks == 64
    assert report.passed == {"correctness_reward_func": 64, "format_reward_func": 64}


def test_every_reference_without_full_marks_is_reported():
    rows = [
        row(format_solution("r", "72"), "72"),
        row(format_solution("r", "1080"), "1,080"),  # numerically right, but not what the reference says
        row("<answer>72</answer>", "72"),
        row(format_solution("r", "72"), None),  # cannot be scored
        row(format_solution("r", "1,080"), "1,080"),
    ]
    report = audit(tag_bundle(), rows)
    assert not report.ok
    assert report.rows_with_full_marks == 2
    assert report.passed == {"correctness_reward_func": 3, "format_reward_func": 4}
    assert [(failure.row, failure.reward, failure.score, failure.full_marks) for failure in report.failures] == [
        (1, "correctness_reward_func", 1.5, 2.0),
        (2, "format_reward_func", 0.4, 0.8),
        (3, "correctness_reward_func", None, 2.0),
    ]
    assert audit(gsm8k_bundle().select("int_reward_func"), rows).rows_with_full_marks == 4


def test_own_rewards_and_columns():
    def length_reward(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    rows = [{"reference": "abc"}, {"reference": "abcd"}]
    report = audit([length_reward], rows, solution_column="reference", full_marks={"length_reward": 3.0})
    assert [failure.row for failure in report.failures] == [1]
    report = audit([get_correctness_reward(exact_score=5.0)], [row("<answer>1</answer>", "1")])
    assert report.ok


def test_what_cannot_be_audited_is_told():
    with pytest.raises(ValueError, match="no rows"):
        audit(tag_bundle(), [])
    with pytest.raises(ValueError, match="row 0 has no text in column 'solution'"):
        audit(tag_bundle(), [{"answer": "1"}])
    with pytest.raises(ValueError, match="the full marks of '<lambda>' are not known"):
        audit([lambda completions, **kwargs: [0.0]], [row("x", "1")])
    with pytest.raises(ValueError, match="returned 0 scores for 1 rows"):
        audit([lambda completions, **kwargs: []], [row("x", "1")], full_marks={"<lambda>": 1.0})


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit_rewards.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_script(tmp_path):
    good = {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in [good, good]))
    result = run_script(file)
    assert result.returncode == 0
    assert "2 of 2 references get full marks" in result.stdout

    file.write_text(json.dumps({"question": "q", "answer": "#### 1,080"}))
    result = run_script(file, "--bundle", "gsm8k")
    assert result.returncode == 1
    assert "int_reward_func 0 of 0.5, answer '1,080'" in result.stdout

    file.write_text(json.dumps(good) + "\n" + json.dumps({"question": "q", "answer": "2"}))
    result = run_script(file)
    assert result.returncode == 2
    assert "line 2: the answer has no '#### '" in result.stderr
    assert "Traceback" not in result.stderr
