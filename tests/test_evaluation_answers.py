"""Files of answers: what is written is read again, and what cannot be read is told by file and line."""

import json
import os
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.evaluation import Answer, append_answers, grade, read_answers, write_answers
from trl_grpo_ext.evaluation.answers import write_lines


ANSWERS = [
    Answer(
        id="a",
        sample=0,
        temperature=0.0,
        prompt=[{"role": "user", "content": "How many?"}],
        completion="<answer>5</answer>",
        answer="5",
        tokens=4,
        finish_reason="stop",
    ),
    Answer(id=7, sample=0, temperature=1.0, prompt="q", completion="\u2028 \u00e9 \U0001f600 \ud800\n\0", answer=5.5),
    Answer(id=7, sample=1, temperature=1.0, prompt="q", completion="", answer=5.5, tokens=0, finish_reason="length"),
]


def test_what_is_written_is_read_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    for answers in (ANSWERS, [answer.graded() for answer in ANSWERS]):
        write_answers(file, answers)
        assert read_answers(file) == answers
        assert len(file.read_bytes().splitlines()) == 3
    assert list(tmp_path.iterdir()) == [file]
    line = json.loads(file.read_text().splitlines()[0])
    assert list(line) == [
        *("id", "sample", "temperature", "prompt", "completion", "answer"),
        *("extracted", "correct", "tokens", "finish_reason"),
    ]


@given(st.text(), st.text(), st.text(min_size=1) | st.integers())
def test_any_text_is_kept(tmp_path_factory, completion, prompt, problem):
    file = tmp_path_factory.getbasetemp() / "answers.jsonl"
    answers = [Answer(id=problem, completion=completion, prompt=prompt, answer=1)]
    write_answers(file, answers)
    assert read_answers(file) == answers


def test_text_stays_legible(tmp_path):
    write_answers(tmp_path / "answers.jsonl", [Answer(id=1, completion="\u7b54\u6848", answer=1)])
    assert "\u7b54\u6848" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("reference", "written"),
    [(np.int64(5), "5"), (np.float32(0.1), "0.1"), (Decimal("72.00"), "72"), (5, 5), (0.1, 0.1), ("#### 5", "#### 5")],
)
def test_references_of_every_kind_are_written(tmp_path, reference, written):
    answer = Answer(id=1, completion="#### 5", answer=reference)
    write_answers(tmp_path / "answers.jsonl", [answer])
    (again,) = read_answers(tmp_path / "answers.jsonl")
    assert again.answer == written
    assert again.graded().correct == answer.graded().correct == grade("#### 5", reference).correct


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "answers.jsonl"
    write_answers(file, ANSWERS[:1])

    def fail():
        yield ANSWERS[1]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_answers(file, fail())
    assert read_answers(file) == ANSWERS[:1]
    assert list(tmp_path.iterdir()) == [file]


def test_links_and_pipes_stay_what_they_are(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("answers.jsonl", "link.jsonl", "pipe"))
    link.symlink_to(file.name)
    write_answers(link, ANSWERS[:1])
    assert link.is_symlink()
    assert read_answers(file) == ANSWERS[:1]
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_answers(pipe, ANSWERS[:1])
    assert os.read(reader, 100_000) == file.read_bytes()
    os.close(reader)
    assert pipe.is_fifo()


def test_answers_are_appended(tmp_path):
    file = tmp_path / "answers.jsonl"
    append_answers(file, ANSWERS[:1])
    append_answers(file, [])
    append_answers(file, ANSWERS[1:])
    assert read_answers(file) == ANSWERS


@pytest.mark.parametrize("kept", range(1, 80))
def test_a_writer_that_was_ended_in_the_middle_of_a_line(tmp_path, kept):
    file = tmp_path / "answers.jsonl"
    write_answers(file, ANSWERS[:2])
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + second[: -min(kept, len(second))])
    whole = ANSWERS[:2] if kept == 1 else ANSWERS[:1]  # its line break alone is missing
    assert read_answers(file, ignore_unfinished_line=True) == whole
    if kept not in (1, len(second)):
        with pytest.raises(ValueError, match=r"answers.jsonl, line 2: it is no JSON"):
            read_answers(file)
    append_answers(file, ANSWERS[2:])
    assert read_answers(file) == [*whole, ANSWERS[2]]


def test_an_unfinished_line_that_is_long(tmp_path):
    file = tmp_path / "answers.jsonl"
    write_answers(file, ANSWERS[:1])
    with open(file, "ab") as stream:
        stream.write(b'{"id": 1, "completion": "' + b"x" * 1_000_000)
    append_answers(file, ANSWERS[1:])
    assert read_answers(file) == ANSWERS


def test_a_broken_line_that_is_not_the_last_is_never_left_out(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id": 1\n{"id": 1, "completion": "", "answer": 1}\n')
    with pytest.raises(ValueError, match="line 1: it is no JSON"):
        read_answers(file, ignore_unfinished_line=True)


def test_files_of_others(tmp_path):
    """Samples are numbered in their order, messages become texts, other keys are left alone."""
    file = tmp_path / "answers.jsonl"
    lines = [
        '\ufeff{"id": 1, "prompt": "q", "completion": "#### 5", "answer": 5, "model": "m"}',
        "",
        '{"id": 1, "prompt": "q", "completion": [{"role": "assistant", "content": "6"}], "answer": 5}',
        '{"id": "1", "completion": {"content": "7"}, "answer": 5.5, "sample": null, "tokens": null}',
        '{"id": 1, "prompt": "q", "completion": "8", "answer": 5, "temperature": 0}',
    ]
    file.write_text("\r\n".join(lines), encoding="utf-8")
    answers = read_answers(file)
    assert [(answer.id, answer.sample, answer.completion) for answer in answers] == [
        (1, 0, "#### 5"),
        (1, 1, "6"),
        ("1", 0, "7"),
        (1, 0, "8"),
    ]


def test_verdicts_are_read_as_answers(tmp_path):
    """As `grade --lines` writes them; a data set whose references are true and false is none of that."""
    verdict = {"id": 1, "completion": "5", "reference": "5"}
    names = dict.fromkeys(("strict", "answer", "lm_eval_strict", "lm_eval_flexible"), True)
    write_lines(
        tmp_path / "a.jsonl", [{**verdict, **names}, {"id": 2, "completion": "", "answer": True, "reference": "x"}]
    )
    assert [answer.answer for answer in read_answers(tmp_path / "a.jsonl")] == ["5", True]


GOOD = {"id": 1, "completion": "c", "answer": 5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        (f'{{"id": {"9" * 5000}}}', "no JSON"),
        (b"\xff", "no JSON"),
        ("5", "an object with the keys 'id', 'completion', 'answer' is expected, not a int"),
        ("{}", "there is no 'id', 'completion', 'answer'; the keys are none"),
        (
            '{"id": 1, "completion": "c", "target": 1}',
            "there is no 'answer'; the keys are 'id', 'completion', 'target'",
        ),
        ({"id": None}, "'id' is None, and must be a text or a whole number"),
        ({"id": 1.5}, "'id' is 1.5"),
        ({"id": True}, "'id' is True"),
        ({"completion": None}, "'completion' is None, and must be a text or messages"),
        ({"completion": 5}, "'completion' is 5"),
        ({"answer": None}, "'answer' is None, and must be a text or a number"),
        ({"answer": " "}, "'answer' is ' '"),
        ({"answer": ["5"]}, r"'answer' is \['5'\]"),
        ({"answer": float("nan")}, "'answer' is nan"),
        ({"sample": -1}, "'sample' is -1, and must be a whole number from 0"),
        ({"sample": "1"}, "'sample' is '1'"),
        ({"temperature": "hot"}, "'temperature' is 'hot', and must be a number from 0"),
        ({"temperature": float("inf")}, "'temperature' is inf"),
        ({"prompt": 5}, "'prompt' is 5"),
        ({"tokens": 1.5}, "'tokens' is 1.5"),
        ({"finish_reason": "eos"}, "'finish_reason' is 'eos', and must be 'stop' or 'length'"),
        ({"finish_reason": []}, r"'finish_reason' is \[\]"),
        ({"extracted": {"strict": 5}}, "'extracted' is"),
        ({"correct": {"strict": "yes"}}, "'correct' is"),
        ({"sample": 0}, "it is the same sample as line 1 .id 1, sample 0.: leave one out"),
        (
            {"answer": 6, "sample": 1},
            "'answer' is 6 where line 1 of the same id 1 has 5: an id stands for one problem",
        ),
        ({"prompt": "q", "sample": 1}, "'prompt' is 'q' where line 1 of the same id 1 has None"),
    ],
)
def test_a_line_that_is_no_answer(tmp_path, line, message):
    file = tmp_path / "answers.jsonl"
    if isinstance(line, dict):
        line = json.dumps({**GOOD, **line})
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"answers.jsonl, line 3: .*{message}") as caught:
        read_answers(file)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
