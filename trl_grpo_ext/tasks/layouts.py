r"""From a row of a data set to a problem: its question, its answer, and how that is found.

A layout is a function from a row to a [`Problem`], which raises `ValueError` where the row has none. Published data
sets are told by their columns:

- GSM8K (Cobbe et al., arXiv 2110.14168): `question`, and `answer` with the final answer behind `####`;
- MATH (Hendrycks et al., arXiv 2103.03874) and MATH-500: `problem`, and `answer` where there is one, else `solution`
  with the final answer in the last `\boxed{}`;
- SVAMP (Patel et al., arXiv 2103.07191): `Body` and `Question`, or both in `question_concat`, and `Answer`;
- ASDiv (Miao et al., arXiv 2106.15772): `body`, `question`, and `answer` with a unit behind the number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ..rewards.extract import END_OF_THINKING, HASH_MARKER, extract_tagged_answer
from ..rewards.extractors import AnswerExtractor, extract_answer, get_answer_extractor
from ..rewards.numbers import parse_plain_number
from ..rewards.references import number_to_text, reference_to_text
from .files import Row
from .prompts import format_solution


# GSM8K's solutions carry the results of a calculator in place: "48/2 = <<48/2=24>>24".
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
ID_COLUMNS = ("id", "ID", "unique_id")


@dataclass(frozen=True)
class Problem:
    """A question with its reference.

    Args:
        question (`str` or `list[dict]`):
            The question's text, or messages.
        answer (`str`):
            What answers are compared with.
        solution (`str`, *optional*):
            A completion in the format that the system prompt asks for, tags included.
        id (`str`, *optional*):
            What the data set calls the problem.
    """

    question: str | list[dict[str, str]]
    answer: str
    solution: str | None = None
    id: str | None = None


Layout: TypeAlias = Callable[[Row], Problem]

# What a text must have for an answer to be found in it, by the extractor's name.
_WANTED = {
    "tag": "closed <answer> tag with the final answer in it",
    "xml": "answer",
    "boxed": r"'\boxed{}' with the final answer in it",
    "hash": f"'{HASH_MARKER}' followed by the final answer",
    "last_number": "number",
    "think": f"'{END_OF_THINKING}' followed by the final answer",
}


def read_columns(row: Row, question_column: str, answer_column: str, answer_extractor: AnswerExtractor) -> Problem:
    """The problem of a row whose columns are named.

    The text from which an answer is taken out becomes the solution.
    """
    question = _question(row, question_column)
    if answer_extractor == "none":
        return Problem(question, _answer(row, answer_column), None, _id(row))
    text = _text(row, answer_column)
    answer = extract_answer(text, answer_extractor)
    if not answer:
        wanted = _WANTED.get(answer_extractor) if isinstance(answer_extractor, str) else None
        raise ValueError(f"the {answer_column} has no {wanted or f'answer that {answer_extractor!r} finds'}")
    return Problem(question, answer, _solution(text, answer, answer_extractor), _id(row))


def _solution(text: str, answer: str, answer_extractor: AnswerExtractor) -> str | None:
    """The text from which an answer was taken, in the format that the system prompt asks for."""
    if answer_extractor in ("tag", "xml"):
        return text if extract_tagged_answer(text) == answer else None
    if answer_extractor == "hash":
        text = CALCULATOR_ANNOTATION.sub("", text.rpartition(HASH_MARKER)[0])
    if answer_extractor == "think":
        text = text.rpartition(END_OF_THINKING)[0].strip().removeprefix("<think>")
    return format_solution(text.strip(), answer)


def read_math(row: Row) -> Problem:
    """MATH: `problem`, `solution` and perhaps `answer`."""
    if reference_to_text(row.get("answer")) is None:
        return read_columns(row, "problem", "solution", "boxed")
    answer = _answer(row, "answer")
    solution = format_solution(_text(row, "solution").strip(), answer) if row.get("solution") else None
    return Problem(_text(row, "problem"), answer, solution, _id(row))


def read_svamp(row: Row) -> Problem:
    """SVAMP: a story and a question about it; `Answer` is a number, which some copies write as `"8.0"`."""
    question = _text(row, "question_concat") if row.get("question_concat") else _join(row, "Body", "Question")
    answer = _answer(row, "Answer")
    number = parse_plain_number(answer)
    if number is not None and number.denominator == 1:
        answer = number_to_text(number) or answer
    return _with_formula(row, question, answer, "Equation")


def read_asdiv(row: Row) -> Problem:
    """ASDiv: like SVAMP, with a unit behind the number: `"8 (apples)"`."""
    # where several numbers are asked for, "8 (apples); 9 (pears)"
    numbers = [part.partition("(")[0].strip() for part in _answer(row, "answer").split(";")]
    if not all(numbers):
        raise ValueError("the answer has no number before its unit")
    return _with_formula(row, _join(row, "body", "question"), "; ".join(numbers), "formula")


def choose_layout(
    row: Row,
    question_column: str | None = None,
    answer_column: str | None = None,
    answer_extractor: AnswerExtractor | None = None,
) -> Layout:
    """The layout of a data set, from its first row and what has been said about it.

    Where nothing is said, a published data set is known by its columns, and others have `question` and `answer`.
    Answers are what follows `####` if the first row's has that, else as they are.
    """
    if question_column is answer_column is answer_extractor is None:
        for needed, layout in _BY_COLUMNS:
            if row.keys() >= needed:
                return layout
    question_column, answer_column = question_column or "question", answer_column or "answer"
    if answer_extractor is None:
        answer_extractor = "hash" if HASH_MARKER in str(row.get(answer_column)) else "none"
    get_answer_extractor(answer_extractor)  # refuses what is none
    return partial(
        read_columns,
        question_column=question_column,
        answer_column=answer_column,
        answer_extractor=answer_extractor,
    )


_BY_COLUMNS: tuple[tuple[set[str], Layout], ...] = (
    ({"problem", "solution"}, read_math),
    ({"question_concat", "Answer"}, read_svamp),
    ({"Body", "Question", "Answer"}, read_svamp),
    ({"body", "question", "answer"}, read_asdiv),
)


def _with_formula(row: Row, question: str, answer: str, column: str) -> Problem:
    """A problem whose solution is no text but a formula."""
    formula = row.get(column)
    solution = format_solution(formula.strip(), answer) if isinstance(formula, str) and formula.strip() else None
    return Problem(question, answer, solution, _id(row))


def _join(row: Row, *columns: str) -> str:
    """Sentences of several columns as one text; a story that does not end is given its full stop."""
    texts = [_text(row, column).strip() for column in columns]
    return " ".join([*(text if text[-1:] in ".!?" else f"{text}." for text in texts[:-1]), texts[-1]])


def _question(row: Row, column: str) -> str | list[dict[str, str]]:
    value = row.get(column)
    if isinstance(value, list):  # messages
        messages = []
        for message in value:
            if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
                raise ValueError(f"column {column!r} holds a list that is no list of messages with role and content")
            messages.append({name: _text(message, name) for name in ("role", "content")})
        if messages:
            return messages
    return _text(row, column)


def _answer(row: Row, column: str) -> str:
    """A cell that is the answer: a text, as it is, or a number, with its own digits."""
    value = row.get(column)
    if isinstance(value, str) or value is None:
        return _text(row, column).strip()
    answer = reference_to_text(value)
    if answer is None:
        raise ValueError(f"column {column!r} holds a {type(value).__name__}, and must hold a text or a number")
    return answer


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"no text in column {column!r}; its columns are {', '.join(sorted(row)) or 'none'}")
    _check_characters(value, column)
    return value


def _id(row: Row) -> str | None:
    for column in ID_COLUMNS:
        value: Any = row.get(column)
        if value is not None:
            text = str(value)
            _check_characters(text, column)
            return text
    return None


def _check_characters(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no valid text in column {column!r}, half of a character ({error})") from None
