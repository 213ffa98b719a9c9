"""How an answer is found, by a name: the option `answer_extractor`, which is the same wherever it is taken."""

from collections.abc import Callable
from functools import partial
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


# A name, or a function from a completion's text to its answer, `None` if there is none.
AnswerExtractor: TypeAlias = str | Callable[[str], str | None]

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


def get_answer_extractor(
    answer_extractor: AnswerExtractor, *, answer_tag: Tag = "answer"
) -> Callable[[str], str | None]:
    r"""The function that finds an answer.

    Args:
        answer_extractor (`str` or `Callable`):
            `"tag"`, what the last closed answer tag holds ([`extract_tagged_answer`]); `"xml"`, the notebooks' lenient
            form of that, which takes a text without tags whole ([`extract_xml_answer`]); `"boxed"`, what the last
            `\boxed{}` holds; `"hash"`, what follows the last `####`; `"think"`, what follows the last `</think>`;
            `"last_number"`, the last number in the text; `"none"`, the whole text. Or a function from a completion's
            text to its answer, `None` if there is none.
        answer_tag (`str` or `tuple[str, str]`, *optional*, defaults to `"answer"`):
            The tag of `"tag"` and `"xml"`: its name, or its opening and closing texts.

    Raises:
        ValueError: If there is no extractor of this name; the message gives the nearest one.

    Example:
    ```python
    >>> get_answer_extractor("tag", answer_tag=("<SOLUTION>", "</SOLUTION>"))("so <SOLUTION>24</SOLUTION>")
    '24'
    ```
    """
    if callable(answer_extractor):
        return answer_extractor
    if answer_extractor not in ANSWER_EXTRACTORS:
        hint = suggestion(str(answer_extractor), ANSWER_EXTRACTORS)
        raise ValueError(
            f"answer_extractor must be one of {', '.join(ANSWER_EXTRACTORS)} or a function from a text to its answer, "
            f"got {answer_extractor!r}{hint}"
        )
    function, _ = _EXTRACTORS[answer_extractor]
    return partial(function, tag=answer_tag) if answer_extractor in _WITH_TAG else function


def check_answer_extractor(reward: str, answer_extractor: AnswerExtractor, answer_tag: Tag) -> None:
    """Raise `ValueError` unless both options can be used; the message names the reward."""
    to_tag_pair(reward, "answer_tag", answer_tag)
    try:
        get_answer_extractor(answer_extractor)
    except ValueError as error:
        raise ValueError(f"{reward}: {error}") from None


def completion_giving(answer: str, answer_extractor: AnswerExtractor, answer_tag: Tag = "answer") -> str | None:
    """The shortest completion in which an extractor finds this answer.

    Returns:
        `str` or `None`:
            `None` where that is not known, because a function of the user's finds it in none of the common forms.
    """
    opening, closing = to_tag_pair("completion_giving", "answer_tag", answer_tag)
    templates = [template for _, template in _EXTRACTORS.values()]
    if not callable(answer_extractor):
        templates = [_EXTRACTORS[answer_extractor][1]]
    completions = [template.format(answer=answer, opening=opening, closing=closing) for template in templates]
    if not callable(answer_extractor):
        return completions[0]
    for completion in completions:
        try:
            if answer_extractor(completion) == answer:
                return completion
        except Exception:  # noqa: S112  # the function is the user's: whatever it raises, it has found no answer
            continue
    return None
