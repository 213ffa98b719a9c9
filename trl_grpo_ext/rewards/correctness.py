"""Rewards for the answer: is it the reference's, character for character or as a number?"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from numbers import Rational
from typing import Any

from ._base import Reward, Tag, check_score
from .extract import CURRENCY, NUMBER
from .extractors import AnswerExtractor, check_answer_extractor, completion_giving, get_answer_extractor
from .references import number_to_text, reference_to_text
from .text import completion_to_text


# Beyond these a text is not taken for a number: exact arithmetic on a million digits is what a hostile answer wants.
MAX_DIGITS = 1000
MAX_EXPONENT = 1000

# A text that is a number and nothing else. What LaTeX puts around it (`\boxed{}`, `$...$`) is taken off beforehand.
PLAIN_NUMBER = re.compile(rf"(?:{CURRENCY}[ ]?)?{NUMBER.pattern}(?:[ ]?(?:\\?%|{CURRENCY}))?\.?", re.VERBOSE)
# What may stand around an answer's number without changing its value: LaTeX that only shows it, markdown, degrees, and
# then letters, white space, punctuation, currency signs and `%`.
SHOWING = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textrm|mathbf|mathrm)\{|\\(?:quad\b|[()\[\],;:!$% ])|\*\*|\^\{?\\circ\b"
)
AROUND = re.compile(rf"(?:[^\W\d_]|{CURRENCY}|[\s.,;:?!'\"\u2018-\u201d()\[\]{{}}=%#\u00b0*/`-])*+")
WORD = re.compile(r"[^\W\d_]++")
UNITS = frozenset(
    (
        *("m", "g", "l", "L", "s", "h", "C", "F", "km", "cm", "mm", "mi", "ft", "in"),
        *("yd", "kg", "mg", "lb", "oz", "ml", "hr", "am", "pm", "st", "nd", "rd", "th"),
    )
)
ARTICLES = frozenset("aAI")
NAMED = re.compile(r"[\s$*]{0,9}=")
VALUE_WORDS = frozenset(
    (
        *("pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "inf", "infinity"),
        *("minus", "negative", "squared", "cubed", "factorial", "hundred"),
        *("thousand", "million", "billion", "trillion"),
    )
)
LATEX_WRAPPERS = (("\\boxed{", "}"), ("\\(", "\\)"), ("$", "$"))


def parse_number(text: str | float | Decimal | Rational | None) -> Fraction | None:
    r"""The one number that a text denotes, exactly, or `None` if it denotes none or several.

    Understood are signs (also the Unicode minus), thousands commas (`1,080`), currency signs, `%` (ignored: GSM8K says
    "50" for 50 %), decimals with or without a leading 0, a trailing period, powers of ten (`1.5e3`), simple fractions
    (`3/4`, `\frac{3}{4}`), and words, units or `\boxed{...}` around the number.

    Args:
        text (`str`, a number or `None`):
            The text, or a number of any kind (Python's, `Decimal`, numpy's).

    Returns:
        `Fraction` or `None`:
            The number; `None` also for a denominator of 0, more than `MAX_DIGITS` digits or an exponent beyond
            `MAX_EXPONENT`. Never raises, and takes time linear in the text's length.

    Example:
    ```python
    >>> parse_number("about 1,080 apples")
    Fraction(1080, 1)
    >>> parse_number(r"\frac{3}{4}")
    Fraction(3, 4)
    >>> parse_number("3 or 4") is None
    True
    ```
    """
    if isinstance(text, Rational):
        return Fraction(int(text.numerator), int(text.denominator))
    if not isinstance(text, str):
        text = number_to_text(text)
        if text is None:
            return None
    numbers = list(islice(NUMBER.finditer(text), 2))
    return _match_to_fraction(numbers[0]) if len(numbers) == 1 else None


def parse_answer_number(text: str | None) -> Fraction | None:
    r"""The one number that an answer gives, or `None` if it gives none, several, or more mathematics than a number.

    Words, units, currency signs, `%`, punctuation, `\boxed{...}`, `\text{...}`, `$...$` and `x =` may stand around the
    number. What changes the value may not: `\sqrt{13}` is not 13, and `5!`, `5x`, `x^5`, `5\pi`, `5 million` and
    `(5,\infty)` are not 5.

    Args:
        text (`str` or `None`):
            The answer.

    Returns:
        `Fraction` or `None`:
            The number, within the bounds of [`parse_number`]. Never raises, and takes linear time.
    """
    numbers = list(islice(NUMBER.finditer(text or ""), 2))
    if text is None or len(numbers) != 1:
        return None
    number = numbers[0]
    before, after = SHOWING.sub(" ", text[: number.start()]), text[number.end() :]
    touching = WORD.match(after)
    after = SHOWING.sub(" ", after)
    if not AROUND.fullmatch(before) or not AROUND.fullmatch(after) or after.lstrip().startswith("!"):
        return None
    if before[-1:].isalnum() or (touching and _is_latin(touching[0]) and _may_be_factor(touching[0], min_letters=3)):
        return None
    for word in WORD.finditer(before):
        is_variable = _is_latin(word[0]) and _may_be_factor(word[0], min_letters=2)
        if _changes_value(word[0]) or (is_variable and not NAMED.match(before, word.end())):
            return None
    for word in WORD.finditer(after):
        if _changes_value(word[0]) or (_is_latin(word[0]) and _may_be_factor(word[0], min_letters=2)):
            return None
    return _match_to_fraction(number)


def _may_be_factor(word: str, min_letters: int) -> bool:
    return len(word) < min_letters and word not in UNITS and word not in ARTICLES


def _changes_value(word: str) -> bool:
    return word.lower() in VALUE_WORDS


def _is_latin(word: str) -> bool:
    """Whether single letters stand for variables in this script; a Chinese word may have one."""
    return word[0] < "\u0590" or not word[0].isalpha()


def parse_plain_number(text: str) -> Fraction | None:
    r"""The number that a text is as a whole, or `None` if it is anything else or more.

    A sign, currency signs, thousands commas, decimals, `%`, powers of ten, simple fractions, a trailing period, and
    `\boxed{...}` or `$...$` around it all are part of a number; words, units and the rest of mathematics are not:
    `\sqrt{13}`, `\frac56`, `(2,\infty)`, `2^{10}` and `72 apples` have numbers in them and are none.

    Args:
        text (`str`):
            The text.

    Returns:
        `Fraction` or `None`:
            The number, within the bounds of [`parse_number`]. Never raises, and takes linear time.
    """
    text = text.strip()
    for opening, closing in LATEX_WRAPPERS * 2:
        if len(text) > len(opening) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip()
    match = PLAIN_NUMBER.fullmatch(text)
    return None if match is None else _match_to_fraction(match)


def _match_to_fraction(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > MAX_DIGITS:
        return None
    groups = match.groupdict()
    if groups["decimal"]:
        value = _to_fraction(groups["decimal"])
    elif groups["thousands"]:
        value = _to_fraction(groups["thousands"].replace(",", "") + groups["thousands_decimals"])
    elif groups["mantissa"]:
        exponent = _to_fraction(groups["exponent"])
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = _to_fraction(groups["mantissa"]) * Fraction(10) ** int(exponent)
    else:
        numerator = _to_fraction(groups["numerator"] or groups["latex_numerator"])
        denominator = _to_fraction(groups["denominator"] or groups["latex_denominator"])
        if denominator == 0:
            return None
        value = numerator / denominator
    negative = _is_minus(groups["outer_sign"]) != _is_minus(groups["sign"])
    return -value if negative else value


def _to_fraction(digits: str) -> Fraction:
    # by way of Decimal, because `int` and `Fraction` refuse texts that are longer than Python's limit for integers
    return Fraction(Decimal(digits.replace("\u2212", "-")))


def _is_minus(sign: str | None) -> bool:
    return sign in ("-", "\u2212")


def numerically_equal(a: str | float | Decimal | Rational | None, b: str | float | Decimal | Rational | None) -> bool:
    r"""Whether both sides denote one single number, and the same one.

    The comparison is exact (`fractions.Fraction`), so 0.1 is not 0.1000000000000000000001. Whatever the notebooks'
    rule (exactly one match of `-?\d*\.?\d+` on each side, the same number) accepts is accepted, but for one case: that
    rule overlooks a minus that is not ASCII or stands before a currency sign, and so takes `\u22125` and `-$5` for 5.
    Here they are -5. Like that rule it overlooks mathematics that changes a value (13 in `\sqrt{13}`); rewards and
    evaluation do not, see [`is_reference_number`].

    Args:
        a (`str`, a number or `None`):
            One side, see [`parse_number`] for what is understood.
        b (`str`, a number or `None`):
            The other side.

    Returns:
        `bool`:
            `False` also where either side is no single number. Never raises.

    Example:
    ```python
    >>> numerically_equal("$1,000.00", 1000)
    True
    >>> numerically_equal("3/4", "0.75")
    True
    ```
    """
    left = parse_number(a)
    return left is not None and left == parse_number(b)


def is_reference_number(given: str | None, reference: str) -> bool:
    r"""Whether a reference is a plain number, and an answer denotes the same one.

    The answer may have words, units or `\boxed{...}` around its number, see [`parse_answer_number`]. The reference may
    not, see [`parse_plain_number`]: an answer of 13 is wrong where the reference is `\sqrt{13}`, and the other way.

    Args:
        given (`str` or `None`):
            The answer.
        reference (`str`):
            The reference, as [`reference_to_text`] gives it.

    Returns:
        `bool`:
            `False` also where the answer is no single number. Never raises.

    Example:
    ```python
    >>> is_reference_number("24.0 apples", "24")
    True
    ```
    """
    number = parse_plain_number(reference)
    return number is not None and number == parse_answer_number(given)


@dataclass(frozen=True, kw_only=True)
class AnswerReward(Reward):
    """A reward that compares the completion's answer with a column of the data set."""

    answer_column: str
    answer_extractor: AnswerExtractor
    answer_tag: Tag

    def __post_init__(self) -> None:
        super().__post_init__()
        check_answer_extractor(self.name, self.answer_extractor, self.answer_tag)
        if not isinstance(self.answer_column, str) or not self.answer_column:
            raise ValueError(f"{self.name}: answer_column must be a column's name, got {self.answer_column!r}")

    def completion_giving(self, answer: str) -> str | None:
        """The shortest completion that gives this answer; `None` where a function of the user's finds it."""
        return completion_giving(answer, self.answer_extractor, self.answer_tag)

    def extract(self, text: str) -> str | None:
        """The answer that a completion gives; `None` if there is none, or the user's function fails on the text."""
        extractor = get_answer_extractor(self.answer_extractor, answer_tag=self.answer_tag)
        if not callable(self.answer_extractor):
            return extractor(text)
        try:
            answer = extractor(text)
        except Exception:
            return None
        return answer if isinstance(answer, str) else number_to_text(answer)

    def grade(self, extracted: str | None, reference: str) -> float | None:
        raise NotImplementedError

    def is_correct(self, extracted: str | None, reference: str) -> bool:
        raise NotImplementedError

    def grade_batch(self, pairs: Sequence[tuple[str | None, str]]) -> list[tuple[float | None, bool]]:
        """The score of each pair of an answer and a reference, `None` if there is none; and whether it is right."""
        return [(self.grade(*pair), self.is_correct(*pair)) for pair in pairs]

    def __call__(
        self,
        prompts: list[Any] | None = None,
        completions: list[Any] | None = None,
        answer: list[Any] | None = None,
        *,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if completions is None:
            raise ValueError(f"{self.name}: completions is missing")
        references = self._references(answer, columns)
        if len(references) != len(completions):
            raise ValueError(
                f"{self.name}: {len(completions)} completions but {len(references)} values of {self.answer_column!r}; "
                "there must be one for each completion"
            )
        extracted = [self.extract(completion_to_text(completion)) for completion in completions]
        texts = list(map(reference_to_text, references))
        pairs = [(given, text) for given, text in zip(extracted, texts, strict=True) if text is not None]
        grades = self.grade_batch(pairs)
        correct = [is_correct for score, is_correct in grades if score is not None]
        # Where there is nothing to compare with: not scored, which is not the same as wrong.
        scores = iter(grades)
        rewards = [None if text is None else next(scores)[0] for text in texts]
        # Two answer rewards in one bundle must not write into the same column, TRL would append the one to the other.
        prefix = "" if self.name == "correctness_reward_func" else f"{self.name.removesuffix('_reward_func')}/"
        if log_extra is not None:
            log_extra(f"{prefix}extracted_answer", extracted)
        if log_metric is not None and correct:
            log_metric(f"{prefix}accuracy", sum(correct) / len(correct))
        return rewards

    def _references(self, answer: list[Any] | None, columns: dict[str, Any]) -> list[Any]:
        references = answer if self.answer_column == "answer" else columns.get(self.answer_column)
        if references is None:
            found = sorted(columns if answer is None else ["answer", *columns])
            raise ValueError(
                f"{self.name} needs the dataset column {self.answer_column!r} and was given {found}; add the column, "
                "or name another one with the answer_column option of the reward's factory"
            )
        if isinstance(references, str):
            raise ValueError(f"{self.name}: {self.answer_column!r} must be a list, not a string")
        return list(references)


@dataclass(frozen=True, kw_only=True)
class CorrectnessReward(AnswerReward):
    """See [`get_correctness_reward`]."""

    exact_score: float
    numeric_score: float
    wrong_score: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("exact_score", "numeric_score", "wrong_score"):
            check_score(self.name, option, getattr(self, option))

    @property
    def full_marks(self) -> float:
        return self.exact_score

    def grade(self, extracted: str | None, reference: str) -> float:
        if extracted == reference:
            return self.exact_score
        return self.numeric_score if is_reference_number(extracted, reference) else self.wrong_score

    def is_correct(self, extracted: str | None, reference: str) -> bool:
        return extracted == reference or is_reference_number(extracted, reference)


def get_correctness_reward(
    *,
    exact_score: float = 2.0,
    numeric_score: float = 1.5,
    wrong_score: float = 0.0,
    answer_extractor: AnswerExtractor = "tag",
    answer_tag: Tag = "answer",
    answer_column: str = "answer",
    name: str = "correctness_reward_func",
) -> Callable[..., list[float | None]]:
    """A score for the right answer inside a closed answer tag.

    Logs the extracted answers as the column `extracted_answer` and the share of right ones (exact or numeric) as the
    metric `accuracy`; under a name of its own, the reward puts that name before both.

    Args:
        exact_score (`float`, *optional*, defaults to `2.0`):
            Score where the extracted answer equals the reference character for character, white space at the ends
            aside.
        numeric_score (`float`, *optional*, defaults to `1.5`):
            Score where the reference is a plain number and the extracted answer denotes the same one, see
            [`is_reference_number`].
        wrong_score (`float`, *optional*, defaults to `0.0`):
            Score of everything else, an unclosed or missing answer tag included.
        answer_extractor (`str` or `Callable`, *optional*, defaults to `"tag"`):
            How the answer is found, by name or by a function, see [`get_answer_extractor`].
        answer_tag (`str` or `tuple[str, str]`, *optional*, defaults to `"answer"`):
            The answer tag, by its name, or its opening and closing texts.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            The dataset column with the references, see [`reference_to_text`]: texts, GSM8K's solutions, numbers. Where
            a reference is missing (`None`, NaN, empty), the reward is `None`.
        name (`str`, *optional*, defaults to `"correctness_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function: `prompts`, `completions` and `answer` to a list of floats or `None`. It raises
            `ValueError` if the column is missing or has another length than `completions`.

    Example:
    ```python
    >>> reward = get_correctness_reward()
    >>> completions = ["<answer>24</answer>", "<answer>24.0</answer>", "<answer>25</answer>", "24"]
    >>> reward(completions=completions, answer=["24"] * 4)
    [2.0, 1.5, 0.0, 0.0]
    ```
    """
    return CorrectnessReward(
        name=name,
        answer_extractor=answer_extractor,
        answer_tag=answer_tag,
        answer_column=answer_column,
        exact_score=exact_score,
        numeric_score=numeric_score,
        wrong_score=wrong_score,
    )


@dataclass(frozen=True, kw_only=True)
class ExactCorrectnessReward(AnswerReward):
    """See [`get_exact_correctness_reward`]."""

    exact_score: float
    wrong_score: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_score(self.name, "score", self.exact_score)
        check_score(self.name, "wrong_score", self.wrong_score)

    @property
    def full_marks(self) -> float:
        return self.exact_score

    def grade(self, extracted: str | None, reference: str) -> float:
        return self.exact_score if extracted == reference else self.wrong_score

    def is_correct(self, extracted: str | None, reference: str) -> bool:
        return extracted == reference


def get_exact_correctness_reward(
    *,
    score: float = 2.0,
    wrong_score: float = 0.0,
    answer_extractor: AnswerExtractor = "xml",
    answer_tag: Tag = "answer",
    answer_column: str = "answer",
    name: str = "exact_correctness_reward_func",
) -> Callable[..., list[float | None]]:
    """The notebooks' first correctness reward: string equality of the leniently extracted answer.

    It does not see that 24.0 is 24 or 1,000 is 1000, and it scores a bare answer without any tag. Logs like
    [`get_correctness_reward`], as `exact_correctness/extracted_answer` and `exact_correctness/accuracy`.

    Args:
        score (`float`, *optional*, defaults to `2.0`):
            Score where the extracted answer equals the reference character for character, white space at the ends
            aside.
        wrong_score (`float`, *optional*, defaults to `0.0`):
            Score of everything else.
        answer_extractor (`str` or `Callable`, *optional*, defaults to `"xml"`):
            How the answer is found, by name or by a function, see [`get_answer_extractor`].
        answer_tag (`str` or `tuple[str, str]`, *optional*, defaults to `"answer"`):
            The answer tag, by its name, or its opening and closing texts.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            The dataset column with the references, see [`reference_to_text`]: texts, GSM8K's solutions, numbers. Where
            a reference is missing (`None`, NaN, empty), the reward is `None`.
        name (`str`, *optional*, defaults to `"exact_correctness_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function, see [`get_correctness_reward`].

    Example:
    ```python
    >>> reward = get_exact_correctness_reward(score=1.0)
    >>> reward(completions=["14", "24"], answer=["14", "14"])
    [1.0, 0.0]
    ```
    """
    return ExactCorrectnessReward(
        name=name,
        answer_extractor=answer_extractor,
        answer_tag=answer_tag,
        answer_column=answer_column,
        exact_score=score,
        wrong_score=wrong_score,
    )


correctness_reward_func = get_correctness_reward()
exact_correctness_reward_func = get_exact_correctness_reward()
