"""Rewards for the structure of a completion: `<reasoning>...</reasoning>` and then `<answer>...</answer>`.

Other formats are other *sections*, one after the other. A section is a tag, by its name or by the texts that open and
close it, and either of the two may be empty: `("", "</think>")` begins with the completion, because the template has
opened it, `("Answer:", "")` ends with it, and `("", "")` is text without tags, as after `</think>`.

The scores are those of the reward functions that the GSM8K notebooks share, so they are drop-ins. Two things differ
on purpose: "any" text may span lines, and every function is linear in the text's length. A lazy `.*?` between two tags
backtracks quadratically on a text that repeats the first one; it is enough to look at the text's two ends and to
search the middle once.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ._base import Tag, TextReward, check_score, to_tag_pair, to_tuple
from .extractors import AnswerExtractor, check_answer_extractor, extract_answer


# An integer as people write it: a sign (\u2212 is the Unicode minus), digits, and commas in the right places if any.
WRITTEN_INTEGER = re.compile(r"[-+\u2212]?(?:\d++|[1-9]\d{0,2}+(?:,\d{3})++)")


TAGS = ("reasoning", "answer")


@dataclass(frozen=True, kw_only=True)
class SectionsReward(TextReward):
    """A reward over the sections of a completion.

    Args:
        tags (`tuple`):
            The reasoning tag and the answer tag, each a name, or its opening and closing texts.
        sections (`Sequence`, *optional*):
            Any number of sections in their place.
    """

    tags: tuple[Tag, Tag]
    sections: Sequence[Tag] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("tags", "sections"):
            object.__setattr__(self, option, to_tuple(getattr(self, option)))
        if not isinstance(self.tags, tuple) or len(self.tags) != 2:
            raise ValueError(f"{self.name}: tags must be two tags, like {TAGS}, got {self.tags!r}")
        if self.sections is not None and self.tags != TAGS:
            raise ValueError(f"{self.name}: tags are two sections; give tags or sections, not both")
        if self.sections is not None and not (isinstance(self.sections, tuple) and self.sections):
            raise ValueError(
                f"{self.name}: sections must be a list of tags, like ['think', ('<SOLUTION>', '</SOLUTION>')], got "
                f"{self.sections!r}"
            )
        pairs = self.pairs  # refuses what is no tag
        for (_, closing), (opening, _) in pairwise(pairs):
            if not (closing or opening):
                raise ValueError(
                    f"{self.name}: nothing shows where one section ends and the next one begins, of two that follow "
                    f"each other one needs a text there: {pairs}"
                )
        for text in self.texts:
            if self.texts.count(text) > 1:
                raise ValueError(f"{self.name}: {text!r} stands for two places of a completion: {pairs}")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The opening and the closing texts of the sections."""
        option, sections = ("tags", self.tags) if self.sections is None else ("sections", self.sections)
        return [
            ("", "") if section == ("", "") else to_tag_pair(self.name, option, section, open_ended=True)
            for section in sections
        ]

    @property
    def texts(self) -> list[str]:
        """The texts that a completion should have, in order."""
        return [text for pair in self.pairs for text in pair if text]


@dataclass(frozen=True, kw_only=True)
class XMLCountReward(TextReward):
    """See [`get_xmlcount_reward`]."""

    tags: tuple[Tag, Tag]
    score_per_tag: float
    penalty_per_char: float
    final_newline_penalty: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tags", to_tuple(self.tags))
        if not isinstance(self.tags, tuple) or len(self.tags) != 2:
            raise ValueError(f"{self.name}: tags must be two tags, like {TAGS}, got {self.tags!r}")
        _ = self.all_tags  # refuses what is no tag
        check_score(self.name, "score_per_tag", self.score_per_tag)
        check_score(self.name, "penalty_per_char", self.penalty_per_char)

    @property
    def all_tags(self) -> tuple[str, str, str, str]:
        """The opening and the closing texts of the two tags, in order."""
        reasoning, answer = (to_tag_pair(self.name, "tags", tag) for tag in self.tags)
        return *reasoning, *answer

    @property
    def full_marks(self) -> float:
        return 4 * self.score_per_tag

    def score(self, text: str) -> float:
        reasoning_open, reasoning_close, answer_open, answer_close = self.all_tags
        if not self.final_newline_penalty:
            text = text.removesuffix("\n")
        score = 0.0
        if text.count(f"{reasoning_open}\n") == 1:
            score += self.score_per_tag
        if text.count(f"\n{reasoning_close}\n") == 1:
            score += self.score_per_tag
        chars_after_line, chars_after_tag = self._trailing_chars(text, f"\n{answer_close}")
        if text.count(f"\n{answer_open}\n") == 1:
            score += self.score_per_tag - self.penalty_per_char * chars_after_line
        if text.count(f"\n{answer_close}") == 1:
            score += self.score_per_tag - self.penalty_per_char * chars_after_tag
        return score

    def _trailing_chars(self, text: str, closing: str) -> tuple[int, int]:
        """How many characters too many follow the closing tag's line, and how many the tag itself."""
        if self.final_newline_penalty:
            # Counted as the notebooks do: without a final line break the first is the length of the whole text. They
            # split, which finds tags from the left; the last one from the right can share its line break with another.
            return len(text.split(f"{closing}\n")[-1]), len(text.split(closing)[-1]) - 1
        trailing_chars = len(text.rpartition(closing)[2].removeprefix("\n"))
        return trailing_chars, trailing_chars


def get_xmlcount_reward(
    *,
    score_per_tag: float = 0.125,
    penalty_per_char: float = 0.001,
    final_newline_penalty: bool = True,
    tags: tuple[Tag, Tag] = TAGS,
    name: str = "xmlcount_reward_func",
) -> Callable[..., list[float]]:
    r"""A score for each tag that stands exactly once in its place, less a penalty for text after the last one.

    The four places are `"<reasoning>\n"`, `"\n</reasoning>\n"`, `"\n<answer>\n"` and `"\n</answer>"`.

    Args:
        score_per_tag (`float`, *optional*, defaults to `0.125`):
            Score of each of the four tags.
        penalty_per_char (`float`, *optional*, defaults to `0.001`):
            What each character after the closing answer tag costs. It is charged twice, with the opening answer tag
            and with the closing one. There is no lower bound: a text that goes on for long scores far below zero.
        final_newline_penalty (`bool`, *optional*, defaults to `True`):
            As in the notebooks, where a text that does not end in a line break is charged its whole length once.
            `False` does not see a line break at the end.
        tags (`tuple`, *optional*, defaults to `("reasoning", "answer")`):
            The reasoning tag and the answer tag, each a name, or its opening and closing texts.
        name (`str`, *optional*, defaults to `"xmlcount_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function: `completions` to a list of floats.
    """
    return XMLCountReward(
        name=name,
        tags=tags,
        score_per_tag=score_per_tag,
        penalty_per_char=penalty_per_char,
        final_newline_penalty=final_newline_penalty,
    )


@dataclass(frozen=True, kw_only=True)
class _LayoutReward(SectionsReward):
    """A score for texts of one layout as a whole, 0.0 for all others."""

    full_score: float
    exactly_once: bool
    final_newline: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.name, "score", self.full_score)

    @property
    def full_marks(self) -> float:
        return self.full_score

    def at_start(self, opening: str) -> str:
        """What the text begins with."""
        raise NotImplementedError

    def at_end(self, closing: str) -> str:
        """What the text ends with."""
        raise NotImplementedError

    def between(self, closing: str, opening: str) -> str:
        """The expression of what stands between two sections. It never backtracks over more than white space."""
        raise NotImplementedError

    def matches(self, text: str) -> bool:
        """Whether the sections follow one another: the first place for each boundary leaves the most for the rest."""
        pairs = self.pairs
        start, end = self.at_start(pairs[0][0]), self.at_end(pairs[-1][1])
        position, stop = len(start), len(text) - len(end)
        if not (text.startswith(start) and text.endswith(end)):
            return False
        for (_, closing), (opening, _) in pairwise(pairs):
            boundary = re.compile(self.between(closing, opening)).search(text, position, stop)
            if boundary is None:
                return False
            position = boundary.end()
        return position <= stop

    def score(self, text: str) -> float:
        if self.final_newline:
            text = text.removesuffix("\n")
        if not self.matches(text) or (self.exactly_once and any(text.count(tag) != 1 for tag in self.texts)):
            return 0.0
        return self.full_score


class SoftFormatReward(_LayoutReward):
    """See [`get_soft_format_reward`]."""

    def at_start(self, opening: str) -> str:
        return opening

    def at_end(self, closing: str) -> str:
        return closing

    def between(self, closing: str, opening: str) -> str:
        # white space beside an open-ended section is a part of it, and a search for it would go quadratic
        return (r"\s*" if closing and opening else "").join(map(re.escape, (closing, opening)))


class StrictFormatReward(_LayoutReward):
    """See [`get_strict_format_reward`]."""

    def at_start(self, opening: str) -> str:
        return opening and f"{opening}\n"

    def at_end(self, closing: str) -> str:
        return closing and f"\n{closing}"

    def between(self, closing: str, opening: str) -> str:
        return re.escape("".join(f"\n{text}" for text in (closing, opening) if text) + "\n")


def get_soft_format_reward(
    *,
    score: float = 0.5,
    exactly_once: bool = False,
    final_newline: bool = False,
    tags: tuple[Tag, Tag] = TAGS,
    sections: Sequence[Tag] | None = None,
    name: str = "soft_format_reward_func",
) -> Callable[..., list[float]]:
    """A score for a text that is a reasoning block and an answer block, with only white space between the two.

    Or, with `sections`, all of these one after the other. Any text may stand in a section, none as well.

    Args:
        score (`float`, *optional*, defaults to `0.5`):
            Score of a text that has the layout; all others get 0.0.
        exactly_once (`bool`, *optional*, defaults to `False`):
            Whether each tag must occur exactly once. The notebooks' expression does not ask for that:
            between the first and the last tag, duplicated blocks are "any text" to it.
        final_newline (`bool`, *optional*, defaults to `False`):
            Whether one line break may follow the last tag.
        tags (`tuple`, *optional*, defaults to `("reasoning", "answer")`):
            The reasoning tag and the answer tag, each a name, or its opening and closing texts.
        sections (`Sequence`, *optional*):
            Any number of sections in the place of these two, as `["think", ("<SOLUTION>", "</SOLUTION>")]`. Of a
            section's two texts either may be empty: `("", "</think>")` where the template has opened it, `("", "")`
            for text without tags.
        name (`str`, *optional*, defaults to `"soft_format_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function: `completions` to a list of floats.
    """
    return SoftFormatReward(
        name=name,
        tags=tags,
        sections=sections,
        full_score=score,
        exactly_once=exactly_once,
        final_newline=final_newline,
    )


def get_strict_format_reward(
    *,
    score: float = 0.5,
    exactly_once: bool = False,
    final_newline: bool = False,
    tags: tuple[Tag, Tag] = TAGS,
    sections: Sequence[Tag] | None = None,
    name: str = "strict_format_reward_func",
) -> Callable[..., list[float]]:
    r"""Like [`get_soft_format_reward`], but each tag must stand on a line of its own.

    Args:
        score (`float`, *optional*, defaults to `0.5`):
            Score of a text that has the layout; all others get 0.0.
        exactly_once (`bool`, *optional*, defaults to `False`):
            Whether each tag must occur exactly once.
        final_newline (`bool`, *optional*, defaults to `False`):
            Whether one line break may follow the last tag.
        tags (`tuple`, *optional*, defaults to `("reasoning", "answer")`):
            The reasoning tag and the answer tag, each a name, or its opening and closing texts.
        sections (`Sequence`, *optional*):
            Any number of sections in the place of these two, as `["think", ("<SOLUTION>", "</SOLUTION>")]`. Of a
            section's two texts either may be empty: `("", "</think>")` where the template has opened it, `("", "")`
            for text without tags.
        name (`str`, *optional*, defaults to `"strict_format_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function: `completions` to a list of floats.

    Example:
    ```python
    >>> reward = get_strict_format_reward()
    >>> completion = "<reasoning>\n2 + 2 = 4\n</reasoning>\n<answer>\n4\n</answer>"
    >>> reward(completions=[completion, "4"])
    [0.5, 0.0]
    ```
    """
    return StrictFormatReward(
        name=name,
        tags=tags,
        sections=sections,
        full_score=score,
        exactly_once=exactly_once,
        final_newline=final_newline,
    )


@dataclass(frozen=True, kw_only=True)
class TagReward(SectionsReward):
    """See [`get_format_reward`]."""

    score_per_tag: float
    missing_score: float
    exactly_once: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.name, "score_per_tag", self.score_per_tag)
        check_score(self.name, "missing_score", self.missing_score)
        if not self.texts:
            raise ValueError(f"{self.name}: sections have no tags that could be scored: {self.pairs}")

    @property
    def full_marks(self) -> float:
        return len(self.texts) * self.score_per_tag

    def score(self, text: str) -> float:
        found = sum((text.count(tag) == 1) if self.exactly_once else (tag in text) for tag in self.texts)
        return self.score_per_tag * found + self.missing_score * (len(self.texts) - found)


def get_format_reward(
    *,
    score_per_tag: float = 0.2,
    missing_score: float = 0.0,
    exactly_once: bool = False,
    tags: tuple[Tag, Tag] = TAGS,
    sections: Sequence[Tag] | None = None,
    name: str = "format_reward_func",
) -> Callable[..., list[float]]:
    """A score for each of the four tags that occurs, wherever and however often.

    Args:
        score_per_tag (`float`, *optional*, defaults to `0.2`):
            Score of each tag that occurs; an opening and a closing tag are two.
        missing_score (`float`, *optional*, defaults to `0.0`):
            Score of each tag that does not; below zero where a notebook charges for it.
        exactly_once (`bool`, *optional*, defaults to `False`):
            Whether a tag that occurs several times counts as missing.
        tags (`tuple`, *optional*, defaults to `("reasoning", "answer")`):
            The reasoning tag and the answer tag, each a name, or its opening and closing texts.
        sections (`Sequence`, *optional*):
            Any number of sections in the place of these two, as `["think", ("<SOLUTION>", "</SOLUTION>")]`. Of a
            section's two texts either may be empty and is not scored then: `("", "</think>")` where the template has
            opened it.
        name (`str`, *optional*, defaults to `"format_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function: `completions` to a list of floats.

    Example:
    ```python
    >>> reward = get_format_reward(sections=[("", "</think>"), ("<SOLUTION>", "</SOLUTION>")], missing_score=-0.5)
    >>> reward(completions=["2 + 2 = 4</think><SOLUTION>4</SOLUTION>", "2 + 2 = 4</think>4"])
    [0.6000000000000001, -0.8]
    ```
    """
    return TagReward(
        name=name,
        tags=tags,
        sections=sections,
        score_per_tag=score_per_tag,
        missing_score=missing_score,
        exactly_once=exactly_once,
    )


@dataclass(frozen=True, kw_only=True)
class IntReward(TextReward):
    """See [`get_int_reward`]."""

    full_score: float
    signs_and_commas: bool
    answer_extractor: AnswerExtractor
    answer_tag: Tag

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.name, "score", self.full_score)
        check_answer_extractor(self.name, self.answer_extractor, self.answer_tag)
        for option in ("answer_extractor", "answer_tag"):
            object.__setattr__(self, option, to_tuple(getattr(self, option)))

    @property
    def full_marks(self) -> float:
        return self.full_score

    def score(self, text: str) -> float:
        answer = extract_answer(text, self.answer_extractor, self.answer_tag) or ""
        is_integer = answer.isdigit() or (self.signs_and_commas and WRITTEN_INTEGER.fullmatch(answer) is not None)
        return self.full_score if is_integer else 0.0


def get_int_reward(
    *,
    score: float = 0.5,
    signs_and_commas: bool = False,
    answer_extractor: AnswerExtractor = "xml",
    answer_tag: Tag = "answer",
    name: str = "int_reward_func",
) -> Callable[..., list[float]]:
    """A score for an extracted answer that `str.isdigit` accepts: no sign, no commas, no decimals.

    Args:
        score (`float`, *optional*, defaults to `0.5`):
            Score of such an answer; all others get 0.0.
        signs_and_commas (`bool`, *optional*, defaults to `False`):
            Whether a sign before the number and thousands commas in it are accepted as well (`-5`, `1,080`). The
            notebooks' function does not accept them, so that it cannot be had for 82 of GSM8K's training answers.
        answer_extractor (`str`, `Callable` or a tuple of these, *optional*, defaults to `"xml"`):
            How the answer is found, see [`get_answer_extractor`]; by default leniently.
        answer_tag (`str` or `tuple[str, str]`, *optional*, defaults to `"answer"`):
            The answer tag, by its name, or its opening and closing texts.
        name (`str`, *optional*, defaults to `"int_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function: `completions` to a list of floats.
    """
    return IntReward(
        name=name,
        full_score=score,
        signs_and_commas=signs_and_commas,
        answer_extractor=answer_extractor,
        answer_tag=answer_tag,
    )


xmlcount_reward_func = get_xmlcount_reward()
soft_format_reward_func = get_soft_format_reward()
strict_format_reward_func = get_strict_format_reward()
int_reward_func = get_int_reward()
format_reward_func = get_format_reward()
