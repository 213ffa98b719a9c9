import json

import pytest
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from launch import ROOT

from trl_grpo_ext.rewards import (
    audit,
    check_references,
    get_correctness_reward,
    gsm8k_bundle,
    int_reward_func,
    tag_bundle,
)
from trl_grpo_ext.rewards.names import find_rewards
from trl_grpo_ext.tasks import format_solution, load_arithmetic, load_gsm8k


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
    assert audit([int_reward_func], rows).rows_with_full_marks == 4


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


def test_references_that_are_no_plain_numbers_are_told():
    answers = ["72", r"\sqrt{13}", "1,080", None, "(2, 3)", "#### 5"]
    report = audit(tag_bundle(), [row(format_solution("r", str(answer)), answer) for answer in answers])
    assert report.not_numbers == {"answer": [1, 4]}
    assert audit([int_reward_func], [row("72", "x")]).not_numbers == {}


def written_as_in_gsm8k(folder):
    """A file with what GSM8K's answers are: whole numbers, of which some have thousands commas or a sign."""
    answers = ["72", "1,080", "-3", "1,575,000", "0"]
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps({"question": "q", "answer": f"So.\n#### {n}"}) + "\n" for n in answers))
    return file


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "recipes" / "configs").glob("*.yaml")))
def test_a_recipes_own_references_get_full_marks(tmp_path, config):
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / config).read_text())
    bundle = find_rewards(settings["bundle"])
    assert audit(bundle, load_gsm8k(str(written_as_in_gsm8k(tmp_path)))).ok
    assert audit(bundle, load_arithmetic("train", 64)).ok


def stream(rows, calls):
    def generate():
        calls.append(True)
        yield from rows

    return IterableDataset.from_generator(generate)


def test_the_first_rows_are_checked():
    good = [{"prompt": "q", "answer": str(n)} for n in range(40)]
    bad = [{"prompt": "q", "answer": "<answer>5</answer>"}]
    for rows in (good, [{"prompt": "q", "answer": None}] * 20 + good, good + bad):
        check_references(gsm8k_bundle(), rows)
        check_references(gsm8k_bundle(), Dataset.from_list(rows))
    for rows in (bad, good[:7] + bad):
        with pytest.raises(ValueError, match=r"correctness_reward_func gives row . of train_dataset 0.0 of 2 .*bare"):
            check_references(tag_bundle(), Dataset.from_list(rows))
    check_references(tag_bundle(), None)
    check_references(None, [{"prompt": "q"}])
    check_references([int_reward_func, lambda **kwargs: [0.0], "some/reward-model"], [{"prompt": "q"}])
    check_references(get_correctness_reward(answer_column="target"), [{"target": 5}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "q", "target": "5"}],
            r"the column 'answer', which row 0 of .* have \(its columns are prompt, target\)",
        ),
        ([{"prompt": "q", "answer": None}] * 3, "which is empty in each of the first 3 rows"),
        ([{"prompt": "q", "answer": ["5", "five"]}], r"row 0 .*holds a list .*must hold a text or a number"),
        ([{"prompt": "q", "answer": "..."}], "0.0 of 2 for its own reference, '...'"),
        ([], "train_dataset has no rows"),
    ],
)
def test_data_that_cannot_be_graded_is_told_in_one_line(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        check_references(tag_bundle(), rows)
    assert "\n" not in str(error.value)


def test_a_stream_is_where_it_was_after_the_check():
    rows = [{"prompt": "q", "answer": str(n)} for n in range(100)]
    calls = []
    dataset = stream(rows, calls)
    before = dataset.state_dict()
    check_references(tag_bundle(), dataset)
    assert calls == [True]
    assert dataset.state_dict() == before
    assert list(dataset) == rows
    for _ in zip(range(30), dataset, strict=False):
        pass
    half_way = stream(rows, calls)
    half_way.load_state_dict(dataset.state_dict())
    check_references(tag_bundle(), half_way)
    assert [row["answer"] for row in half_way] == [row["answer"] for row in rows[30:]]
    with pytest.raises(ValueError, match="does not have"):
        check_references(tag_bundle(), stream([{"prompt": "q"}], calls))
    with pytest.raises(TypeError, match="is an iterator"):
        check_references(tag_bundle(), iter(rows))


def test_splits_are_no_rows():
    splits = DatasetDict({"train": load_arithmetic("train", 4)})
    with pytest.raises(TypeError, match=r"gives 'train' where a row, a dict, is expected: choose a split"):
        check_references(tag_bundle(), splits)
