import gzip
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from trl_grpo_ext.rewards import gsm8k_bundle, numerically_equal
from trl_grpo_ext.tasks import SYSTEM_PROMPT, load_arithmetic, load_gsm8k
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
