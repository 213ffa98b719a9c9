r"""Rewards that pay nothing for a completion that games its format.

A classic format reward looks at a text from one side, and a policy finds the others: tags that are empty, doubled, or
wrapped in one another, an answer that stands where the reasoning should, text without end. Here a completion either
has the whole layout or it has not, and an answer is paid only inside of it. What each known hack is paid by the
classic and by the hardened bundle is in the guide `recipes/guides/rewards.md`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ._base import Tag, check_score, to_tag_pair, to_tuple
from .extract import PLACEHOLDER
from .extractors import AnswerExtractor, ExtractorFunction, check_answer_extractor, completion_giving, extract_answer
from .format import SectionsReward


CODE_FENCES = ("```", "~~~")
# A tag of any name, which inside of a section starts another one.
_ANY_TAG = re.compile(r"</?[A-Za-z][\w-]{0,40}+>")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


@dataclass(frozen=True, kw_only=True)
class HardenedLayout:
    """The options that the hardened rewards share; see [`get_hardened_format_reward`]."""

    max_chars: int
    max_answer_chars: int
    min_reasoning_chars: int

    def check(self, reward: str) -> None:
        """Raise `ValueError` unless each is a whole number above 0."""
        for option in ("max_chars", "max_answer_chars", "min_reasoning_chars"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{reward}: {option} must be a whole number above 0, got {value!r}")

    def is_met(self, text: str, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether a text is these sections and nothing else, each once, with something in the first and the last.

        Args:
            text (`str`):
                A completion.
            pairs (`Sequence[tuple[str, str]]`):
                The opening and closing texts of the sections, in order; none of them empty.
        """
        text = text.strip()
        if len(text) > self.max_chars:
            return False
        contents = []
        for opening, closing in pairs:
            if not text.startswith(opening) or text.count(opening) != 1 or text.count(closing) != 1:
                return False
            content, _, text = text[len(opening) :].partition(closing)
            contents.append(content)
            text = text.lstrip()
        if text or any(_ANY_TAG.search(content) for content in contents):
            return False
        *reasoning, answer = contents
        if any(len(_LETTER_OR_DIGIT.findall(content)) < self.min_reasoning_chars for content in reasoning):
            return False
        answer = answer.strip()
        return (
            0 < len(answer) <= self.max_answer_chars
            and "\n" not in answer
            and answer != PLACEHOLDER
            and not any(fence in answer for fence in CODE_FENCES)
            and not any(_BOX.search(content) for content in reasoning)
        )


@dataclass(frozen=True, kw_only=True)
class HardenedFormatReward(SectionsReward):
    """See [`get_hardened_format_reward`]."""

    full_score: float
    layout: HardenedLayout

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.name, "score", self.full_score)
        self.layout.check(self.name)
        for tag in self.tags:
            to_tag_pair(self.name, "tags", tag)  # refuses one that is open at an end

    @property
    def full_marks(self) -> float:
        return self.full_score

    def score(self, text: str) -> float:
        return self.full_score if self.layout.is_met(text, self.pairs) else 0.0


def get_hardened_format_reward(
    *,
    score: float = 2.0,
    tags: tuple[Tag, Tag] = ("reasoning", "answer"),
    max_chars: int = 8192,
    max_answer_chars: int = 128,
    min_reasoning_chars: int = 4,
    name: str = "hardened_format_reward_func",
) -> Callable[..., list[float]]:
    r"""A score for a text that is a reasoning block and an answer block and nothing else, 0.0 for all others.

    Each of the four tags must stand there once, only white space around and between the blocks, and no other tag in
    them. The reasoning may have no `\boxed{}` and must say something; the answer must be one line, which is neither
    empty nor the placeholder `...` nor in a code fence. Line breaks beside the tags are free.

    Args:
        score (`float`, *optional*, defaults to `2.0`):
            Score of such a text.
        tags (`tuple`, *optional*, defaults to `("reasoning", "answer")`):
            The reasoning tag and the answer tag, each a name, or its opening and closing texts.
        max_chars (`int`, *optional*, defaults to `8192`):
            Characters that the whole text may have. The longest solution of GSM8K has about 1,200.
        max_answer_chars (`int`, *optional*, defaults to `128`):
            Characters that the answer may have.
        min_reasoning_chars (`int`, *optional*, defaults to `4`):
            Letters and digits that the reasoning must have.
        name (`str`, *optional*, defaults to `"hardened_format_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function: `completions` to a list of floats.

    Example:
    ```python
    >>> reward = get_hardened_format_reward()
    >>> good, empty = "<reasoning>12 + 12</reasoning><answer>24</answer>", "<reasoning></reasoning><answer>24</answer>"
    >>> reward(completions=[good, empty])
    [2.0, 0.0]
    ```
    """
    layout = HardenedLayout(
        max_chars=max_chars, max_answer_chars=max_answer_chars, min_reasoning_chars=min_reasoning_chars
    )
    return HardenedFormatReward(name=name, tags=tags, full_score=score, layout=layout)


@dataclass(frozen=True, kw_only=True)
class HardenedExtractor:
    """See [`get_hardened_extractor`]."""

    tags: tuple[Tag, Tag]
    answer_extractor: AnswerExtractor
    layout: HardenedLayout

    def __post_init__(self) -> None:
        HardenedFormatReward(
            name=_EXTRACTOR, tags=self.tags, full_score=0.0, layout=self.layout
        )  # refuses bad options
        check_answer_extractor(_EXTRACTOR, self.answer_extractor, self.tags[1])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The opening and the closing texts of the two sections."""
        return [to_tag_pair(_EXTRACTOR, "tags", tag) for tag in self.tags]

    def __call__(self, text: str) -> str | None:
        """The answer of a completion that has the layout, `None` of all others."""
        return (
            extract_answer(text, self.answer_extractor, self.tags[1]) if self.layout.is_met(text, self.pairs) else None
        )

    def completion_giving(self, answer: str) -> str | None:
        """The shortest completion that has the layout and gives this answer."""
        in_tag = completion_giving(answer, self.answer_extractor, self.tags[1])
        (opening, closing), (answer_opening, answer_closing) = self.pairs
        if in_tag is None:
            return None
        if not in_tag.startswith(answer_opening):
            in_tag = f"{answer_opening}\n{in_tag}\n{answer_closing}"
        return f"{opening}\n{'x' * self.layout.min_reasoning_chars}\n{closing}\n{in_tag}"


_EXTRACTOR = "hardened_extractor"


def get_hardened_extractor(
    *,
    tags: tuple[Tag, Tag] = ("reasoning", "answer"),
    answer_extractor: AnswerExtractor = "tag",
    max_chars: int = 8192,
    max_answer_chars: int = 128,
    min_reasoning_chars: int = 4,
) -> ExtractorFunction:
    """An `answer_extractor` for any answer reward, which finds answers in completions of one layout only.

    Args:
        tags, max_chars, max_answer_chars, min_reasoning_chars:
            The layout, see [`get_hardened_format_reward`].
        answer_extractor (`str`, `Callable` or a tuple of these, *optional*, defaults to `"tag"`):
            How the answer is found in a completion that has it, see [`get_answer_extractor`].

    Returns:
        `Callable`:
            From a completion's text to its answer, `None` if there is none or the layout is another. Picklable if the
            functions given are.

    Example:
    ```python
    >>> find_answer = get_hardened_extractor()
    >>> find_answer("<reasoning>12 + 12</reasoning><answer>24</answer>"), find_answer("<answer>24</answer>")
    ('24', None)
    ```
    """
    layout = HardenedLayout(
        max_chars=max_chars, max_answer_chars=max_answer_chars, min_reasoning_chars=min_reasoning_chars
    )
    return HardenedExtractor(tags=to_tuple(tags), answer_extractor=to_tuple(answer_extractor), layout=layout)
