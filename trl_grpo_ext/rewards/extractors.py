"""How an answer is found, by a name: the option `answer_extractor`, which is the same wherever it is taken."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import TypeAlias

from ..spelling import suggestion
from ._base import Tag, to_tag_pair
from .extract import (
    END_OF_THINKING,
    HASH_MARKER,
    extract_answer_after_thinking,
    extract_boxed_answer,
    extract_hash_answer,
    extract_last_number,
    extract_tagged_answer,
    extract_xml_answer,
)
from .references import number_to_text


# A function from a completion's text to its answer, `None` if there is none.
ExtractorFunction: TypeAlias = Callable[[str], str | None]
# A name, a function, or several of them, each of which looks at what the one before it has found.
AnswerExtractor: TypeAlias = str | ExtractorFunction | Sequence[str | ExtractorFunction]

# By name: the function, and the shortest completion that gives an answer.
_EXTRACTORS: dict[str, tuple[Callable[..., str | None], str]] = {
    "tag": (extract_tagged_answer, "{opening}\n{answer}\n{closing}"),
    "xml": (extract_xml_answer, "{opening}\n{answer}\n{closing}"),
    "boxed": (extract_boxed_answer, "\\boxed{{{answer}}}"),
    "hash": (extract_hash_answer, f"{HASH_MARKER} {{answer}}"),
    "last_number": (extract_last_number, "{answer}"),
    "think": (extract_answer_after_thinking, f"{END_OF_THINKING}\n{{answer}}"),
    "none": (str.strip, "{answer}"),
}
ANSWER_EXTRACTORS = tuple(_EXTRACTORS)
_WITH_TAG = ("tag", "xml")


def get_answer_extractor(answer_extractor: AnswerExtractor, *, answer_tag: Tag = "answer") -> ExtractorFunction:
    r"""The function that finds an answer.

    Args:
        answer_extractor (`str`, `Callable` or a tuple of these):
            `"tag"`, what the last closed answer tag holds ([`extract_tagged_answer`]); `"xml"`, the notebooks' lenient
            form of that, which takes a text without tags whole ([`extract_xml_answer`]); `"boxed"`, what the last
            `\boxed{}` holds; `"hash"`, what follows the last `####`; `"think"`, what follows the last `</think>`;
            `"last_number"`, the last number in the text; `"none"`, the whole text. Or a function from a completion's
            text to its answer, `None` if there is none. Several one after the other, as `("think", "boxed")`: each
            looks at what the one before it has found, here for a box that does not stand inside of the reasoning.
        answer_tag (`str` or `tuple[str, str]`, *optional*, defaults to `"answer"`):
            The tag of `"tag"` and `"xml"`: its name, or its opening and closing texts.

    Returns:
        `Callable`:
            From a text to the answer in it, `None` if there is none. Picklable if the functions given are.

    Raises:
        ValueError: If there is no extractor of this name; the message gives the nearest one.

    Example:
    ```python
    >>> get_answer_extractor("tag", answer_tag=("<SOLUTION>", "</SOLUTION>"))("so <SOLUTION>24</SOLUTION>")
    '24'
    >>> get_answer_extractor(("think", "boxed"))(r"\boxed{24}? No.</think> It is \boxed{14}.")
    '14'
    ```
    """
    functions = []
    for step in _steps(answer_extractor):
        if callable(step):
            functions.append(step)
        elif step in ANSWER_EXTRACTORS:
            function, _ = _EXTRACTORS[step]
            functions.append(partial(function, tag=answer_tag) if step in _WITH_TAG else function)
        else:
            raise ValueError(
                f"answer_extractor must be one of {', '.join(ANSWER_EXTRACTORS)}, a function from a text to its "
                f"answer, or several of these, got {answer_extractor!r}{suggestion(str(step), ANSWER_EXTRACTORS)}"
            )
    return functions[0] if len(functions) == 1 else partial(_one_after_the_other, functions=tuple(functions))


def _steps(answer_extractor: AnswerExtractor) -> tuple[str | ExtractorFunction, ...]:
    several = isinstance(answer_extractor, list | tuple) and len(answer_extractor) > 0
    return tuple(answer_extractor) if several else (answer_extractor,)  # type: ignore[arg-type, return-value]


def _one_after_the_other(text: str, functions: tuple[ExtractorFunction, ...]) -> str | None:
    found: str | None = text
    for function in functions:
        if found is None:
            return None
        found = function(found)
    return found


def check_answer_extractor(reward: str, answer_extractor: AnswerExtractor, answer_tag: Tag) -> None:
    """Raise `ValueError` unless both options can be used; the message names the reward."""
    to_tag_pair(reward, "answer_tag", answer_tag, open_ended=True)
    try:
        get_answer_extractor(answer_extractor)
    except ValueError as error:
        raise ValueError(f"{reward}: {error}") from None


def extract_answer(text: str, answer_extractor: AnswerExtractor, answer_tag: Tag = "answer") -> str | None:
    """The answer that an extractor finds in a completion.

    Returns:
        `str` or `None`:
            `None` if there is none, or where a function of the user's fails on the text, as those do that take the
            first match of an expression without one. A number that it gives is written out.
    """
    extractor = get_answer_extractor(answer_extractor, answer_tag=answer_tag)
    if not any(map(callable, _steps(answer_extractor))):
        return extractor(text)
    try:
        answer = extractor(text)
    except Exception:
        return None
    return answer if isinstance(answer, str) else number_to_text(answer)


def completion_giving(answer: str, answer_extractor: AnswerExtractor, answer_tag: Tag = "answer") -> str | None:
    """The shortest completion in which an extractor finds this answer.

    Returns:
        `str` or `None`:
            `None` where that is not known, because a function of the user's finds it in none of the common forms.
    """
    if hasattr(answer_extractor, "completion_giving"):  # one of this package that knows
        return answer_extractor.completion_giving(answer)
    opening, closing = to_tag_pair("completion_giving", "answer_tag", answer_tag, open_ended=True)
    common = sorted({template for _, template in _EXTRACTORS.values()}, key=lambda form: (len(form), form))
    steps = _steps(answer_extractor)
    for templates in product(*(common if callable(step) else [_EXTRACTORS[step][1]] for step in steps)):
        completion = answer
        for template in reversed(templates):
            completion = template.format(answer=completion, opening=opening, closing=closing)
        is_known = not any(map(callable, steps))
        if is_known or extract_answer(completion, answer_extractor, answer_tag) == answer:
            return completion
    return None
