"""`trl-grpo-ext grade` and `compare`: what they write, print and refuse."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from scipy import stats

from trl_grpo_ext.cli import main
from trl_grpo_ext.evaluation import CONVENTIONS


RIGHT, WRONG, ELSEWHERE = "<answer>5</answer>", "<answer>6</answer>", "It is 5."


def write(file, lines):
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(file)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def lines():
    """As another program may write them: four keys and one of its own, ids and references of several kinds."""
    message = [{"role": "assistant", "content": "So.\n#### 5"}]
    return [
        {"id": 3, "prompt": "q3", "completion": RIGHT, "answer": 5, "model": "m"},
        {"id": "x", "prompt": [{"role": "user", "content": "q"}], "completion": message, "answer": "#### 5"},
        {"id": 4, "prompt": "q4", "completion": ELSEWHERE, "answer": 5.0},
        {"id": 5, "prompt": "q5", "completion": WRONG, "answer": "5"},
    ]


def test_figures_and_verdicts(tmp_path, lines, capsys):
    file = write(tmp_path / "answers.jsonl", lines)
    main(["grade", file, "--output", str(tmp_path / "figures.json"), "--lines", str(tmp_path / "verdicts.jsonl")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["items"] == figures["completions"] == 4
    for name, count in {"strict": 1, "answer": 3, "lm_eval_strict": 1, "lm_eval_flexible": 3, "format": 2}.items():
        bounds = stats.binomtest(count, 4).proportion_ci(method="wilson")
        assert figures[name] == pytest.approx({"mean": count / 4, "low": bounds.low, "high": bounds.high})
    verdicts = read(tmp_path / "verdicts.jsonl")
    expected = [
        (True, True, False, True),
        (False, True, True, True),
        (False, True, False, True),
        (False, False, False, False),
    ]
    for line, verdict, right in zip(lines, verdicts, expected, strict=True):
        assert tuple(verdict[name] for name in CONVENTIONS) == right
        assert verdict["reference"] == line["answer"]
        assert {key: verdict[key] for key in line if key != "answer"} == {
            k: v for k, v in line.items() if k != "answer"
        }
        assert set(verdict) == {*line, *CONVENTIONS, "reference"}
    shown = capsys.readouterr().out
    assert "75.0" in shown
    assert "4 completions of 4 problems" in shown


def test_a_packed_file(tmp_path, lines, capsys):
    plain = write(tmp_path / "answers.jsonl", lines)
    packed = gzip.compress((tmp_path / "answers.jsonl").read_bytes())
    (tmp_path / "answers.jsonl.gz").write_bytes(packed)
    outputs = []
    for file in (plain, f"{plain}.gz"):
        main(["grade", file, "--output", str(tmp_path / "figures.json"), "--lines", str(tmp_path / "verdicts.jsonl")])
        outputs.append([(tmp_path / name).read_text() for name in ("figures.json", "verdicts.jsonl")])
    assert outputs[0] == outputs[1]
    capsys.readouterr()
    (tmp_path / "answers.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(SystemExit, match="1"):
        main(["grade", f"{plain}.gz"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be unpacked" in line


def test_figures_go_into_a_pipe(tmp_path, lines):
    file = write(tmp_path / "answers.jsonl", lines)
    command = [sys.executable, "-m", "trl_grpo_ext", "grade", file, "--output", "/dev/stderr"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ended.stderr)["items"] == 4


def test_without_files_it_prints_alone(tmp_path, lines, capsys):
    file = write(tmp_path / "answers.jsonl", lines)
    main(["grade", file])
    assert os.listdir(tmp_path) == ["answers.jsonl"]
    assert "lm_eval_flexible" in capsys.readouterr().out


def test_verdicts_can_be_graded_again(tmp_path, lines):
    """And what they say of themselves does not count; a key of the same name is kept."""
    lines[0]["reference"] = "own"
    file = write(tmp_path / "answers.jsonl", lines)
    main(["grade", file, "--lines", str(tmp_path / "first.jsonl")])
    first = read(tmp_path / "first.jsonl")
    assert first[0]["reference"] == 5
    assert first[0]["input_reference"] == "own"
    flipped = [{**line, **{name: not line[name] for name in CONVENTIONS}} for line in first]
    file = write(tmp_path / "flipped.jsonl", flipped)
    main(["grade", file, "--lines", str(tmp_path / "second.jsonl")])
    assert read(tmp_path / "second.jsonl") == first


def test_samples(tmp_path, capsys):
    """Without `sample`, completions of a problem are numbered; the seed moves the bootstrap's bounds alone."""
    texts = [RIGHT, WRONG, WRONG, ELSEWHERE, RIGHT, RIGHT]
    file = write(
        tmp_path / "a.jsonl", [{"id": i // 2, "completion": text, "answer": 5} for i, text in enumerate(texts)]
    )
    found = []
    for seed in ("0", "1"):
        main(["grade", file, "--output", str(tmp_path / "figures.json"), "--seed", seed])
        found.append(json.loads((tmp_path / "figures.json").read_text()))
    assert found[0]["samples_per_item"] == 2
    assert found[0]["strict_pass@2"]["mean"] == pytest.approx(2 / 3)
    assert found[0]["maj@2"]["mean"] == pytest.approx(2 / 3)
    assert found[0]["mean@2"]["mean"] == found[1]["mean@2"]["mean"] == found[0]["answer"]["mean"]
    assert "mean@2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "required: answers"),
        (["{folder}/missing.jsonl"], 1, "missing.jsonl: No such file"),
        (["{folder}"], 1, "Is a directory"),
        (["{folder}/empty.jsonl"], 1, "empty.jsonl has no answers in it"),
        (["{folder}/bad.jsonl"], 1, "bad.jsonl, line 2: there is no 'answer'"),
        (["{folder}/twice.jsonl"], 1, "twice.jsonl, line 3: it is the same sample as line 1"),
        (["{folder}/hot.jsonl"], 1, "hot.jsonl: the samples are of several temperatures"),
        (["{folder}/good.jsonl", "--seed", "x"], 2, "invalid int value: 'x'"),
        (["{folder}/good.jsonl", "--seed", "-1"], 2, "--seed must not be negative"),
        (["{folder}/good.jsonl", "--ouput", "x"], 2, "there is no option --ouput: did you mean --output?"),
        (["{folder}/good.jsonl", "{folder}/empty.jsonl"], 2, "belongs to no option"),
        (["{folder}/good.jsonl", "--output", "{folder}/no/figures.json"], 1, "there is no folder"),
        (["{folder}/good.jsonl", "--output", "{folder}"], 2, "is a folder"),
        (["{folder}/good.jsonl", "--output", "{folder}/good.jsonl"], 2, "same file as the file of answers"),
        (["{folder}/good.jsonl", "--output", "{folder}/x", "--lines", "{folder}/./x"], 2, "same file as --output"),
    ],
)
def test_errors_of_grade_are_one_line(tmp_path, capsys, arguments, status, message):
    good = {"id": 1, "completion": RIGHT, "answer": 5}
    write(tmp_path / "good.jsonl", [good])
    write(tmp_path / "bad.jsonl", [good, {"id": 2, "completion": ""}])
    write(tmp_path / "twice.jsonl", [{**good, "sample": 0}, {**good, "id": 2}, {**good, "sample": 0}])
    write(tmp_path / "hot.jsonl", [{**good, "temperature": 0.5}, {**good, "temperature": 1}])
    write(tmp_path / "empty.jsonl", [])
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(["grade", *(argument.format(folder=tmp_path) for argument in arguments)])
    assert stopped.value.code == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("subcommand", ["grade", "compare"])
def test_help_is_quick_and_has_an_example(subcommand):
    code = (
        "import sys\n"
        "from trl_grpo_ext.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(sorted({'torch', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    used = []
    for _ in range(3):  # the first may compile
        before = os.times()
        result = subprocess.run(
            [sys.executable, "-c", code, subcommand, "--help"], capture_output=True, text=True, check=True
        )
        after = os.times()
        used.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(used) < 1.0  # to import torch alone takes longer, on any machine
    assert result.stdout.endswith("[]\n")
    assert f"\nexample:\n  trl-grpo-ext {subcommand} " in result.stdout


# compare


def answers(texts, **options):
    return [{"id": i, "prompt": f"q{i}", "completion": t, "answer": 5, **options} for i, t in enumerate(texts)]


def compare(tmp_path, a, b, *arguments):
    files = write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)
    main(["compare", *files, "--output", str(tmp_path / "comparison.json"), *arguments])
    return json.loads((tmp_path / "comparison.json").read_text())


def test_a_difference(tmp_path, capsys):
    """Of 60 problems, 30 are right in both, 18 in b alone, 4 in a alone; under `strict` it is the other way round."""
    a = [RIGHT] * 30 + [WRONG] * 18 + [RIGHT] * 4 + [WRONG] * 8
    b = [ELSEWHERE] * 30 + [ELSEWHERE] * 18 + [WRONG] * 4 + [WRONG] * 8
    found = compare(tmp_path, answers(a), answers(b))
    assert found["items"] == 60
    assert (found["unpaired_a"], found["unpaired_b"]) == (0, 0)
    row = found["answer"]
    assert (row["a"], row["b"], row["only_a"], row["only_b"]) == (34 / 60, 48 / 60, 4, 18)
    assert row["p"] == pytest.approx(stats.binomtest(4, 22).pvalue)
    assert row["difference"] == pytest.approx(14 / 60)
    half = 1.96 * (((18 + 4) / 60 - (14 / 60) ** 2) / 60) ** 0.5
    assert (row["low"], row["high"]) == pytest.approx((14 / 60 - half, 14 / 60 + half), abs=0.02)
    assert (found["strict"]["only_a"], found["strict"]["only_b"]) == (34, 0)
    assert found["conclusion"].startswith("b is better under answer: +23.3 points (")
    assert f"p = {row['p']:.3f}" in found["conclusion"]
    assert "a is better under strict: -56.7 points" in found["conclusion"]
    assert "p < 0.001" in found["conclusion"]
    shown = " ".join(capsys.readouterr().out.split())
    assert found["conclusion"] in shown
    assert "4, 18" in shown
    assert "60 problems are in both." in shown


def test_the_conclusion_goes_by_a_convention(tmp_path):
    a, b = answers([RIGHT] * 30), answers([ELSEWHERE] * 30)
    assert compare(tmp_path, a, b)["conclusion"].startswith("No difference can be told under answer: +0.0 points (-")
    found = compare(tmp_path, a, b, "--convention", "strict")
    assert found["conclusion"].startswith("a is better under strict: -100.0 points (-100.0 to -")
    assert "No difference can be told under answer" in found["conclusion"]


def test_problems_are_paired_by_id(tmp_path, capsys):
    """In any order, whether ids are numbers or texts; those of one file alone are left out."""
    a = answers([RIGHT, WRONG, RIGHT, WRONG, RIGHT])
    b = [{**line, "id": str(line["id"])} for line in reversed(answers([RIGHT, RIGHT, WRONG, WRONG]))]
    b.append({"id": "more", "completion": "", "answer": 1})
    found = compare(tmp_path, a, b)
    assert (found["items"], found["unpaired_a"], found["unpaired_b"]) == (4, 1, 1)
    assert (found["answer"]["only_a"], found["answer"]["only_b"]) == (1, 1)
    assert found["answer"]["a"] == 0.5
    assert "in one alone: 1 of a, 1 of b" in " ".join(capsys.readouterr().out.split())


def test_an_id_that_is_a_text_and_a_number(tmp_path, capsys):
    one = {"completion": RIGHT, "answer": 5}
    both = write(tmp_path / "both.jsonl", [{"id": 1, **one}, {"id": "1", **one}])
    with pytest.raises(SystemExit, match="1"):
        main(["compare", both, write(tmp_path / "b.jsonl", [{"id": 1, **one}])])
    (line,) = capsys.readouterr().err.splitlines()
    assert "both as a text and as a number" in line


def test_samples_are_compared_too(tmp_path, capsys):
    greedy = answers([RIGHT] * 12 + [WRONG] * 8, temperature=0.0)
    worse = [
        line
        for sample in range(4)
        for line in answers(
            [RIGHT if sample < 1 + i % 2 else WRONG for i in range(20)], temperature=1.0, sample=sample
        )
    ]
    better = [
        line
        for sample in range(2)
        for line in answers(
            [RIGHT if sample < 1 + i % 2 else WRONG for i in range(20)], temperature=1.0, sample=sample
        )
    ]
    found = compare(tmp_path, greedy + worse, greedy + better)
    assert found["kind_a"] == found["kind_b"] == "greedy"
    assert found["answer"]["difference"] == 0
    assert found["answer"]["p"] == 1
    assert (found["mean@2"]["a"], found["mean@2"]["b"]) == (0.375, 0.75)
    assert found["pass@2"]["a"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert found["pass@2"]["b"] == 1
    assert found["mean@2"]["low"] > 0.3
    assert found["mean@2"]["p"] is None
    assert "maj@2" in found
    assert "strict_pass@2" in found
    shown = capsys.readouterr().out
    assert "pass@2" in shown
    assert "strict_pass@2" not in shown
    found = compare(tmp_path, worse, better)
    assert found["kind_a"] == "sampled at 1"
    assert found["answer"]["p"] is None
    assert found["conclusion"].startswith("b is better under answer: +37.5 points")


def test_greedy_beside_sampled_is_said(tmp_path, capsys):
    compare(tmp_path, answers([RIGHT], temperature=0), answers([RIGHT], temperature=0.7))
    shown = " ".join(capsys.readouterr().out.split())
    assert "a's completions are greedy, b's sampled at 0.7" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(tmp_path, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    compare(tmp_path, answers([RIGHT] * 900 + [WRONG] * 100), answers([WRONG] * 900 + [RIGHT] * 100))
    compare(tmp_path, answers([RIGHT] * 9), answers([RIGHT] * 9))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines() if line[0] in "┏┃┡│├└") <= width


QUESTION = {"id": 1, "prompt": [{"role": "user", "content": "q"}], "completion": RIGHT, "answer": "5"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"id": 2}, "no problem is in both: the first ids are '1' and '2'"),
        ({"answer": "6"}, "id '1' has the reference '5' in one and '6' in the other"),
        ({"prompt": [{"role": "user", "content": "r"}]}, "id '1' has the prompt 'q' in one and 'r' in the other"),
        ({"prompt": "Question: q"}, "id '1' has the prompt 'q' in one and 'Question: q' in the other"),
    ],
)
def test_problems_that_are_not_the_same(tmp_path, capsys, other, message):
    files = write(tmp_path / "a.jsonl", [QUESTION]), write(tmp_path / "b.jsonl", [{**QUESTION, **other}])
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *files])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    if "prompt" in other:
        main(["compare", *files, "--ignore_prompts"])


def test_the_same_question_may_have_another_system_prompt(tmp_path):
    system = {"role": "system", "content": "Think."}
    other = {**QUESTION, "prompt": [system, *QUESTION["prompt"]], "answer": 5}
    assert compare(tmp_path, [QUESTION], [other])["items"] == 1
    assert compare(tmp_path, [QUESTION], [{**QUESTION, "prompt": "q"}])["items"] == 1
    assert compare(tmp_path, [QUESTION], [{**QUESTION, "prompt": None}])["items"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{folder}/a.jsonl"], 2, "required: b"),
        (["{folder}/a.jsonl", "{folder}/missing"], 1, "missing: No such file"),
        (["{folder}/a.jsonl", "{folder}/bad.jsonl"], 1, "bad.jsonl, line 1"),
        (["{folder}/a.jsonl", "{folder}/a.jsonl", "--convention", "strikt"], 2, "did you mean strict?"),
        (["{folder}/a.jsonl", "{folder}/a.jsonl", "--output", "{folder}/a.jsonl"], 2, "same file as"),
    ],
)
def test_errors_of_compare_are_one_line(tmp_path, capsys, arguments, status, message):
    write(tmp_path / "a.jsonl", [QUESTION])
    write(tmp_path / "bad.jsonl", [{}])
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *(argument.format(folder=tmp_path) for argument in arguments)])
    assert stopped.value.code == status
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert message in shown
