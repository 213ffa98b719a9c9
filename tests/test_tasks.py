import csv
import gzip
import json
import os
import random
import subprocess
import sys

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from trl_grpo_ext.rewards import extract_tagged_answer, gsm8k_bundle, numerically_equal
from trl_grpo_ext.tasks import (
    SYSTEM_PROMPT,
    load_arithmetic,
    load_asdiv,
    load_gsm8k,
    load_math,
    load_problems,
    load_svamp,
    to_problems,
)
from trl_grpo_ext.tasks.arithmetic import KINDS, is_heldout, make_problems


ROWS = [
    {"question": "How many?", "answer": "He has 48/2 = <<48/2=24>>24.\nSo 24.\n#### 24"},
    {"question": "How much?", "answer": "A lot.\n#### 1,080"},
]


def write_jsonl(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def check(dataset):
    assert dataset.column_names == ["prompt", "answer", "solution"]
    assert dataset[0] == {
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "How many?"}],
        "answer": "24",
        "solution": "<reasoning>\nHe has 48/2 = 24.\nSo 24.\n</reasoning>\n<answer>\n24\n</answer>",
    }
    assert dataset["answer"][1] == "1,080"


def test_gsm8k_from_files(tmp_path):
    check(load_gsm8k(str(write_jsonl(tmp_path / "some.jsonl"))))
    check(load_gsm8k(str(write_parquet(tmp_path / "some.parquet"))))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_jsonl, "train.jsonl"),
        (write_parquet, "train.parquet"),
        (write_parquet, "main/train-00000-of-00001.parquet"),
        (write_parquet, "data/train-00000-of-00001.parquet"),
        (write_jsonl, "main/train.jsonl"),
    ],
)
def test_gsm8k_from_folders(tmp_path, write, name):
    write(tmp_path / name)
    write_jsonl(tmp_path / name.replace("train", "test")) if write is write_jsonl else None
    check(load_gsm8k(str(tmp_path), "train"))


def test_gsm8k_takes_the_right_split_and_all_shards(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", ROWS[1:])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[1:])
    check(load_gsm8k(str(tmp_path), "train"))
    assert load_gsm8k(str(tmp_path), "test")["answer"][:] == ["1,080"]
    with pytest.raises(FileNotFoundError, match=r"has no validation\.jsonl or validation\.parquet"):
        load_gsm8k(str(tmp_path), "validation")


def test_gsm8k_with_an_example(tmp_path):
    """A question that is answered as it should be comes first: its answer gets full marks."""
    row = load_gsm8k(str(write_jsonl(tmp_path / "train.jsonl")), with_example=True)[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert row["prompt"][-1]["content"] == "How many?"
    example = row["prompt"][2]["content"]
    scores = {reward.__name__: reward(completions=[example], answer=["35"])[0] for reward in gsm8k_bundle()}
    assert scores["strict_format_reward_func"] == scores["soft_format_reward_func"] == 0.5
    assert scores["correctness_reward_func"] == 2.0


def test_gsm8k_without_system_prompt(tmp_path):
    dataset = load_gsm8k(str(write_jsonl(tmp_path / "some.jsonl")), system_prompt=None)
    assert dataset["prompt"][0] == [{"role": "user", "content": "How many?"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": "24"}', "line 3: the answer has no '####'"),
        ('{"question": "q", "answer": "#### "}', "line 3: the answer has no '####'"),
        ('{"question": "q"}', "line 3: no text in column 'answer'; its columns are question"),
        ('{"answer": "#### 24"}', "line 3: no text in column 'question'"),
        ('{"question": 3, "answer": "#### 24"}', "line 3: no text in column 'question'"),
        ('{"question": ', "line 3: not a JSON object a line"),
        ("[1]", "line 3: not a JSON object but a list"),
        ("[" * 100_000, "line 3: not a JSON object a line"),
        ('{"question": "q \\ud800", "answer": "#### 24"}', "line 3: no valid text in column 'question'"),
        ('{"question": "q", "answer": "\\udcff #### 24"}', "line 3: no valid text in column 'answer'"),
    ],
)
def test_gsm8k_names_the_line_of_a_bad_row(tmp_path, line, message):
    file = tmp_path / "some.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"some\.jsonl, ") as error:
        load_gsm8k(str(file))
    assert message in str(error.value)


def test_gsm8k_in_files_as_they_come(tmp_path):
    """With a byte order mark, gzipped, with line ends of Windows, with columns that do not count."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    lines[0] = lines[0].replace("{", '{"id": ' + "9" * 5_000 + ", ", 1)  # longer than `int` reads
    content = "\r\n".join(lines).encode("utf-8-sig")
    (tmp_path / "bom.jsonl").write_bytes(content)
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(content, mtime=0))
    for name in ("bom.jsonl", "zipped.jsonl.gz", "zipped.jsonl"):
        check(load_gsm8k(str(tmp_path / name)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "zipped.jsonl.gz").rename(tmp_path / "folder" / "train.jsonl.gz")
    check(load_gsm8k(str(tmp_path / "folder")))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl\.gz does not exist"):
        load_gsm8k(str(tmp_path / "nowhere.jsonl.gz"))


def test_gsm8k_reads_a_marker_without_a_space(tmp_path):
    row = load_gsm8k(str(write_jsonl(tmp_path / "some.jsonl", [{"question": "q", "answer": "It is 24.\n####24"}])))[0]
    assert row["answer"] == "24"
    assert row["solution"] == "<reasoning>\nIt is 24.\n</reasoning>\n<answer>\n24\n</answer>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "has no rows"),
        ("blank.jsonl", b"\xef\xbb\xbf\n \n", "has no rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "has no rows"),
        ("cut.jsonl.gz", gzip.compress(b"x" * 100, mtime=0)[:-6], "not a whole gzip file"),
        ("broken.jsonl.gz", gzip.compress(b"x" * 100, mtime=0)[:12] + b"\xff" * 40, "not a whole gzip file"),
        ("surrogate.jsonl", b'\n{"question": "\xed\xa0\x80", "answer": "#### 1"}', "line 2: not a text in UTF-8"),
        ("empty.parquet", b"", "not a parquet file"),
        ("broken.parquet", b"PAR1 and so on, and so on PAR1", "not a parquet file"),
    ],
)
def test_gsm8k_says_what_is_wrong_with_a_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_gsm8k(str(tmp_path / name))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_gsm8k_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        load_gsm8k(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="not a text in UTF-8"):
        load_gsm8k(str(tmp_path / "latin.jsonl"))
    write_parquet(tmp_path / "bad.parquet", [{"question": "q", "answer": "24"}])
    with pytest.raises(ValueError, match=r"bad\.parquet, row 0: the answer has no '####'"):
        load_gsm8k(str(tmp_path / "bad.parquet"))


def evaluate_line(line):
    """What an equation of a worked solution comes to, worked out anew."""
    left, operator, right, equals, value = line.split()
    assert equals == "="
    a, b = int(left), int(right)
    if operator == "/":
        assert a % b == 0
    assert {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else None}[operator] == int(value)
    return int(value)


@pytest.mark.parametrize("split", ["train", "heldout", "heldout_templates"])
def test_arithmetic_solutions_are_right(split):
    for problem in make_problems(split, 800, seed=3):
        values = [evaluate_line(line) for line in problem.reasoning.split("\n")]
        assert 1 <= len(values) <= 3
        assert values[-1] == int(problem.answer) > 0
        assert min(values) > 0
        for number in problem.numbers:
            assert str(number) in problem.question
        assert "{" not in problem.question


def test_arithmetic_answers_follow_from_the_words():
    """One template of each kind, read by hand."""
    expected = {
        "add": lambda a, b: a + b,
        "subtract": lambda a, b: a - b,
        "multiply": lambda a, b: a * b,
        "divide": lambda a, b: a // b,
        "add_subtract": lambda a, b, c: a + b - c,
        "multiply_add": lambda a, b, c: a * b + c,
        "multiply_subtract": lambda a, b, c: a * b - c,
        "three_steps": lambda a, b, c, d: a * b - c + d,
    }
    assert {kind.name for kind in KINDS} == set(expected)
    for problem in make_problems("train", 400, seed=1):
        assert int(problem.answer) == expected[problem.kind](*problem.numbers)


def test_arithmetic_splits_share_no_problem():
    train = [problem for seed in range(3) for problem in make_problems("train", 1500, seed)]
    train_numbers = {(problem.kind, problem.numbers) for problem in train}
    train_templates = {(problem.kind, problem.template) for problem in train}
    for split in ("heldout", "heldout_templates"):
        heldout = make_problems(split, 800, seed=0)
        assert not train_numbers & {(problem.kind, problem.numbers) for problem in heldout}
        assert not {problem.question for problem in train} & {problem.question for problem in heldout}
        templates = {(problem.kind, problem.template) for problem in heldout}
        assert (templates <= train_templates) == (split == "heldout")
        assert bool(templates & train_templates) == (split == "heldout")
    # about one combination in five is held out, in the kinds with few combinations too
    for kind in KINDS:
        rng = random.Random(0)
        numbers = {kind.draw(rng) for _ in range(3000)}
        share = sum(is_heldout(kind.name, combination) for combination in numbers) / len(numbers)
        assert 0.12 < share < 0.28, kind.name


def test_arithmetic_is_made_from_its_seed():
    assert make_problems("train", 50, seed=1) == make_problems("train", 50, seed=1)
    assert make_problems("train", 50, seed=1) != make_problems("train", 50, seed=2)
    questions = [problem.question for problem in make_problems("train", 2000, seed=0)]
    assert len(set(questions)) == 2000


def test_arithmetic_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="split must be one of train, heldout, heldout_templates, not 'test'"):
        make_problems("test", 5)
    with pytest.raises(ValueError, match="size must not be negative"):
        make_problems("train", -1)
    with pytest.raises(ValueError, match="there are not 60000 different problems"):
        make_problems("heldout_templates", 60_000)


def test_arithmetic_columns_suit_the_rewards():
    dataset = load_arithmetic("train", 16, seed=5)
    assert dataset.column_names == ["prompt", "answer", "solution", "kind"]
    scores = {
        reward_func.__name__: reward_func(
            prompts=dataset["prompt"], completions=dataset["solution"], answer=list(dataset["answer"])
        )
        for reward_func in gsm8k_bundle()
    }
    assert scores["correctness_reward_func"] == [2.0] * 16
    assert scores["strict_format_reward_func"] == [0.5] * 16
    assert scores["int_reward_func"] == [0.5] * 16
    assert all(numerically_equal(answer, answer) for answer in dataset["answer"])


def user_says(text):
    return [{"role": "user", "content": text}]


def load(path, **options):
    return load_problems(str(path), system_prompt=None, **options)


def write_as(path, rows):
    """The same rows in the format that the file's ending says."""
    opened = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return write_parquet(path, rows)
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        elif name.endswith(".json"):
            json.dump(rows, file, indent=2)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "train.csv"]
)
def test_any_file_with_columns_of_any_name(tmp_path, name):
    rows = [{"task": 'How, "many"?\nSay', "result": 5, "nr": 7}, {"task": "é", "result": 1080, "nr": 8}]
    path = write_as(tmp_path / name, rows)
    for source in (path, tmp_path) if name.startswith("train") else (path,):
        problems = load(source, question_column="task", answer_column="result")
        assert problems.to_list() == [
            {"prompt": user_says('How, "many"?\nSay'), "answer": "5"},
            {"prompt": user_says("é"), "answer": "1080"},
        ]


@pytest.mark.parametrize(
    ("extractor", "cell", "answer", "solution"),
    [
        ("hash", "2 <<1+1=2>>\n#### 2", "2", "<reasoning>\n2\n</reasoning>\n<answer>\n2\n</answer>"),
        ("boxed", r"\boxed{\frac{1}{2}}!", r"\frac{1}{2}", None),
        ("tag", "x <answer>\n 7\n</answer>", "7", "x <answer>\n 7\n</answer>"),
        ("xml", "x <answer>\n 7\n</answer>", "7", "x <answer>\n 7\n</answer>"),
        ("xml", "7", "7", None),
        ("last_number", "so 7.", "7", None),
        ("think", "<think>\n3 + 4\n</think>\n7", "7", "<reasoning>\n3 + 4\n</reasoning>\n<answer>\n7\n</answer>"),
        (("think", "boxed"), r"\boxed{1}</think>\boxed{7}", "7", None),
        (str.upper, "seven", "SEVEN", None),
        ("none", " x #### 2 ", "x #### 2", None),
        ("none", 0.1, "0.1", None),
        ("none", 3.0, "3", None),
        ("none", -(10**30), str(-(10**30)), None),
        (None, "1 + 1\n#### 2", "2", "<reasoning>\n1 + 1\n</reasoning>\n<answer>\n2\n</answer>"),
        (None, "two", "two", None),
    ],
)
def test_answers_are_taken_out_of_their_column(tmp_path, extractor, cell, answer, solution):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": 1, "q": "q", "a": cell}])
    (row,) = load(path, question_column="q", answer_column="a", answer_extractor=extractor)
    assert (row["id"], row["answer"]) == ("1", answer)
    if extractor in ("boxed", "last_number", str.upper) or isinstance(extractor, tuple):
        assert row["solution"] == f"<reasoning>\n{cell}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    else:
        assert row.get("solution") == solution


@pytest.mark.parametrize(
    ("extractor", "row", "message"),
    [
        ("hash", {"q": "q", "a": "5"}, "line 2: the a has no '####' followed by the final answer"),
        ("boxed", {"q": "q", "a": r"\boxed{5"}, r"line 2: the a has no '\\boxed{}'"),
        ("tag", {"q": "q", "a": "<answer>5"}, "line 2: the a has no closed <answer> tag"),
        ("think", {"q": "q", "a": "5"}, "line 2: the a has no '</think>' followed by the final answer"),
        (("boxed", "last_number"), {"q": "q", "a": r"\boxed{x} 5"}, "the a has no answer that \\('boxed', 'last_n"),
        ("hash", {"q": "q", "a": 5}, "line 2: no text in column 'a'"),
        ("none", {"q": "q", "a": [5]}, "line 2: column 'a' holds a list, and must hold a text or a number"),
        ("none", {"q": "q", "a": ""}, "line 2: no text in column 'a'"),
        ("none", {"q": "q", "b": "5"}, "line 2: no text in column 'a'; its columns are b, q"),
        ("none", {"q": ["x"], "a": "5"}, "line 2: column 'q' holds a list that is no list of messages"),
    ],
)
def test_a_reference_that_cannot_be_taken_out_is_named(tmp_path, extractor, row, message):
    good = {"q": "q", "a": r"</think><answer>1</answer> \boxed{1} #### 1"}
    path = write_jsonl(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(ValueError, match=message) as error:
        load(path, question_column="q", answer_column="a", answer_extractor=extractor)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'question,answer\n"x,5\n', "line 2: not a line of CSV"),
        ("a.csv", "question,answer\nx,5,6\n", "line 2: there are more fields than columns"),
        ("a.csv", "question,answer\nx\n", "line 2: no text in column 'answer'"),
        ("a.csv", "", "has no rows"),
        ("a.json", '[{"question": "x", "answer": 5}, 3]', "row 1: not a JSON object but a number"),
        ("a.json", '[{"question": "x"', "a.json: not a list of JSON objects"),
        ("a.jsonl", '{"question": "x", "answer": 1e9999999999999999999}', "line 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_questions_that_are_messages(tmp_path):
    own = [{"role": "system", "content": "Be brief."}, *user_says("q")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": own, "answer": 1}, {"prompt": user_says("r"), "answer": 2}])
    problems = load_problems(str(path), question_column="prompt", system_prompt="Think.", with_example=True)
    assert problems[0]["prompt"][0] == own[0]
    assert problems[0]["prompt"][-1] == own[-1]
    assert [message["role"] for message in problems[1]["prompt"]] == ["system", "user", "assistant", "user"]
    assert problems[1]["prompt"][0]["content"] == "Think."


def test_math(tmp_path):
    rows = [
        {"problem": "Half?", "solution": r"So $\boxed{\frac{1}{2}}$.", "level": "Level 1", "unique_id": "a/1"},
        {"problem": "Two?", "solution": r"It is $\boxed 2$.", "level": "Level 2", "unique_id": "a/2"},
    ]
    problems = load_math(str(write_jsonl(tmp_path / "a.jsonl", rows)), system_prompt=None)
    assert problems["answer"][:] == [r"\frac{1}{2}", "2"]
    assert problems["id"][:] == ["a/1", "a/2"]
    assert extract_tagged_answer(problems[0]["solution"]) == r"\frac{1}{2}"
    # MATH-500 says what the answer is
    rows = [{**row, "answer": f"{n}"} for n, row in enumerate(rows)]
    assert load_math(str(write_jsonl(tmp_path / "b.jsonl", rows)))["answer"][:] == ["0", "1"]


def test_math_in_a_folder_has_its_subjects(tmp_path):
    for number, subject in enumerate(("precalculus", "algebra")):
        rows = [{"problem": subject, "solution": rf"\boxed{{{number}}}"}]
        write_parquet(tmp_path / subject / "test-00000-of-00001.parquet", rows)
        write_parquet(tmp_path / subject / "train-00000-of-00001.parquet", rows * 2)
    assert load_problems(str(tmp_path), config="algebra")["answer"][:] == ["1", "1"]
    assert sorted(load_math(str(tmp_path), split="test")["answer"]) == ["0", "1"]


def test_svamp(tmp_path):
    row = {
        "ID": "chal-1",
        "Body": "He has 8 apples",
        "Question": "How many?",
        "Equation": "( 8.0 - 3.0 )",
        "Answer": 5.0,
    }
    other = {**row, "ID": "chal-2", "Body": "She has some.", "Answer": "1.50"}
    problems = load_svamp(str(write_jsonl(tmp_path / "a.jsonl", [row, other])), system_prompt=None)
    assert problems["prompt"][:] == [user_says("He has 8 apples. How many?"), user_says("She has some. How many?")]
    assert problems["answer"][:] == ["5", "1.50"]
    assert problems["id"][:] == ["chal-1", "chal-2"]
    assert problems["solution"][0] == "<reasoning>\n( 8.0 - 3.0 )\n</reasoning>\n<answer>\n5\n</answer>"
    row = {"question_concat": "All of it?", "Answer": "5.0", "Question": "it?", "Body": "All of"}
    problems = load_svamp(str(write_jsonl(tmp_path / "b.jsonl", [row])), system_prompt=None)
    assert problems.to_list() == [{"prompt": user_says("All of it?"), "answer": "5"}]


def test_asdiv(tmp_path):
    row = {"body": "There are 9 of 2 kinds.", "question": "How many?", "answer": "8 (apples)", "formula": "9-1=8"}
    rows = [row, {**row, "answer": "8 (apples); 1 (pears)"}, {**row, "answer": "21:30"}]
    problems = load_asdiv(str(write_jsonl(tmp_path / "validation.jsonl", rows)), system_prompt=None)
    assert problems["prompt"][0] == user_says("There are 9 of 2 kinds. How many?")
    assert problems["answer"][:] == ["8", "8; 1", "21:30"]
    assert problems["solution"][0] == "<reasoning>\n9-1=8\n</reasoning>\n<answer>\n8\n</answer>"
    path = write_jsonl(tmp_path / "bad.jsonl", [{**row, "answer": "(apples)"}])
    with pytest.raises(ValueError, match="line 1: the answer has no number before its unit"):
        load_asdiv(str(path))


def test_names_on_the_hub(monkeypatch):
    """Short names stand for a place there; MATH is in seven parts."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        row = {"problem": "q", "solution": r"\boxed{5}"} if "math" in name else {"question": "q", "answer": "#### 5"}
        return Dataset.from_list([row])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(load_problems("math", split="test")) == len({config for _, config, _ in asked}) == 7
    assert load_problems("gsm8k", max_rows=1)["answer"][:] == ["5"]
    assert asked[-1] == ("openai/gsm8k", "main", "train")
    load_problems("some/math", config="b")
    assert asked[-1] == ("some/math", "b", "train")
    assert set(load_problems("arithmetic", split="test", max_rows=3).column_names) >= {"prompt", "answer"}
    assert len(load_problems("arithmetic", max_rows=5)) == 5


def test_data_sets_and_streams_that_are_loaded_already():
    rows = [{"q": "one?", "a": "1", "level": "easy"}, {"q": "two?", "a": "", "level": "hard"}]
    options = {"question_column": "q", "answer_column": "a", "system_prompt": None}
    for dataset in (Dataset.from_list(rows[:1]), Dataset.from_list(rows[:1]).to_iterable_dataset()):
        (first,) = to_problems(dataset, **options)
        assert first == {"prompt": user_says("one?"), "answer": "1"}
        (first,) = to_problems(dataset, keeps_columns=True, **options)
        assert first == {"prompt": user_says("one?"), "answer": "1", **rows[0]}
    # references are texts, as they are from a file, also where their column had numbers
    rows_with_numbers = [{"question": "one?", "answer": 1}, {"question": "two?", "answer": 20}]
    for keeps_columns in (False, True):
        numbers = to_problems(Dataset.from_list(rows_with_numbers), keeps_columns=keeps_columns)
        assert list(numbers["answer"]) == ["1", "20"]
    # columns that a reward looks at are not replaced by what could be made for them
    own = {"q": "one?", "solution": r"so \boxed{1}", "id": 7}
    options_of_own = {"question_column": "q", "answer_column": "solution", "answer_extractor": "boxed"}
    (first,) = to_problems(Dataset.from_list([own]), keeps_columns=True, system_prompt=None, **options_of_own)
    assert first == {"prompt": user_says("one?"), "answer": "1", **own}
    with pytest.raises(ValueError, match="mine, row 1: no text in column 'a'"):
        to_problems(Dataset.from_list(rows), name="mine", **options)
    with pytest.raises(ValueError, match="mine has no rows"):
        to_problems(Dataset.from_list([]), name="mine", **options)


def test_what_cannot_be_loaded(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"answer_extractor must be one of .* got 'latex'"):
        load_problems(str(path), answer_extractor="latex")
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        load_problems(str(path), max_rows=0)
    assert len(load_problems(str(path), max_rows=1)) == 1


def write_large(path, num_rows, length):
    with path.open("w") as file:
        for n in range(num_rows):
            file.write(
                json.dumps({"question": f"{n} " * length, "answer": f"{n} words " * length + f"\n#### {n}"}) + "\n"
            )


def test_a_large_file_is_read_from_the_cache_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_grpo_ext.tasks.problems.BYTES_IN_MEMORY", 100_000)
    path = tmp_path / "large.jsonl"
    write_large(path, 4_000, 4)
    problems = load_gsm8k(str(path))
    assert problems["answer"][:] == [str(n) for n in range(4_000)]
    assert problems.cache_files  # memory-mapped
    assert load_gsm8k(str(path)).cache_files == problems.cache_files
    assert load_gsm8k(str(path), system_prompt=None).cache_files != problems.cache_files
    small = load_gsm8k(str(write_jsonl(tmp_path / "small.jsonl")))
    assert not small.cache_files

    write_large(path, 4_001, 4)
    assert len(load_gsm8k(str(path))) == 4_001
    with path.open("a") as file:
        file.write('{"question": "q", "answer": "24"}\n')
    with pytest.raises(ValueError, match=r"large\.jsonl, line 4002: the answer has no '####'"):
        load_gsm8k(str(path))


# What a process holds beyond its imports while it loads a file, in MiB: at its peak.
MEASURE = """
import sys, threading
import pyarrow.parquet
import datasets
from trl_grpo_ext.tasks import load_gsm8k

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

peak, is_done, before = 0.0, threading.Event(), held()

def watch():
    global peak
    while not is_done.wait(0.01):
        peak = max(peak, held())

watcher = threading.Thread(target=watch)
watcher.start()
problems = load_gsm8k(sys.argv[1])
is_done.set()
watcher.join()
print(len(problems), peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured as Linux tells it")
def test_the_memory_that_a_large_file_takes(tmp_path):
    path = tmp_path / "large.jsonl"
    write_large(path, 140_000, 40)
    assert path.stat().st_size > 80e6
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    rows, growth = result.stdout.split()
    assert int(rows) == 140_000
    assert float(growth) < 60
