"""From a text to the number that it denotes, exactly, or `None`: three rules, from the strictest to the most lenient.

[`parse_plain_number`] is for references: the text is a number and nothing else. [`parse_answer_number`] is for
answers: words and units may stand around the number, nothing may that changes it. [`parse_number`] is the rule of the
first GSM8K notebooks, for those who want to go on with it: the one number in the text, whatever stands around it.

No text makes them raise, and they take linear time.
"""

import re
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from numbers import Rational

from .extract import CURRENCY, NUMBER
from .references import number_to_text


# Beyond these a text is not taken for a number: exact arithmetic on a million digits is what a hostile answer wants.
MAX_DIGITS = 1000
MAX_EXPONENT = 1000
# No answer is as long as this; that of a longer one is not looked for.
MAX_ANSWER_LENGTH = 10_000

# What else a minus and a thousands comma are written as: hyphens and dashes, and LaTeX's and typographers' spaces.
_MINUSES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))
_IN_WORDS = re.compile(rf"\b(?:minus|negative)\s{{1,3}}(?=[\d.]|{CURRENCY})", re.IGNORECASE)
_SPACE = r"(?:[ ~\u00a0\u2009\u202f]|\\[,;:! ])"
_SPACED = re.compile(
    # the first group of a run, so that a run is looked at once
    rf"(?<![\d.,])(?<!\d[ ~\u00a0\u2009\u202f])(?<!\d\\[,;:! ])[1-9]\d{{0,2}}+(?:{_SPACE}\d{{3}})++(?!\d|{_SPACE}\d)"
)
_NO_DIGIT = re.compile(r"\D+")

# A number with what `NUMBER` does not know: mixed numbers, fractions of two digits in LaTeX, Indian thousands.
_FRACTION = r"\\[dt]?frac(?:\{(\d++)\}\{(\d++)\}|([1-9])([1-9])(?!\d))"
_MIXED = re.compile(rf"(?<!\d)([-+]?+)(\d++)(?:[ ]?{_FRACTION}|[ ](\d++)/(\d++)(?![\d/]|\.\d))")
_SHORT_FRACTION = re.compile(r"\\([dt]?)frac([1-9])([1-9])(?!\d)")
_INDIAN = re.compile(r"(?<![\d.,])[1-9]\d?(?:,\d{2}(?=,))++,\d{3}(?!\d|,\d)")

# A text that is a number and nothing else. What LaTeX puts around it (`\\boxed{}`, `$...$`) is taken off beforehand.
PLAIN_NUMBER = re.compile(rf"(?:{CURRENCY}[ ]?)?{NUMBER.pattern}(?:[ ]?(?:\\?%|{CURRENCY}))?\.?", re.VERBOSE)
LATEX_WRAPPERS = (("\\boxed{", "}"), ("\\(", "\\)"), ("$", "$"))

# What may stand around an answer's number without changing its value: LaTeX that only shows it, markdown, degrees, and
# then letters, white space, punctuation, currency signs and `%`.
SHOWING = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textrm|mathbf|mathrm)\{|\\(?:quad\b|[()\[\],;:!$% ])|\*\*|\^\{?\\circ\b"
)
AROUND = re.compile(rf"(?:[^\W\d_]|{CURRENCY}|[\s.,;:?!'\"\u2018-\u201d()\[\]{{}}%#\u00b0*/`-])*+")
WORD = re.compile(r"[^\W\d_]++")
UNITS = frozenset(
    (
        *("m", "g", "l", "L", "s", "h", "C", "F", "km", "cm", "mm", "mi", "ft", "in"),
        *("yd", "kg", "mg", "lb", "oz", "ml", "hr", "am", "pm", "st", "nd", "rd", "th"),
    )
)
ARTICLES = frozenset("aAI")

# Words that make another number of the one beside them, or none, wherever they stand.
NUMBER_WORDS = frozenset(
    (
        *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
        *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty"),
        *("sixty", "seventy", "eighty", "ninety", "half"),
    )
)
MULTIPLIERS = frozenset(
    (
        *("dozen", "dozens", "hundred", "hundreds", "thousand", "thousands", "million", "millions", "billion"),
        *("billions", "trillion", "trillions", "lakh", "lakhs", "crore", "crores", "bn", "mn", "squared", "cubed"),
        *("factorial", "halves", "thirds", "fourths", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths"),
        *("hundredths", "thousandths"),
    )
)
MATHEMATICS = frozenset(
    ("pi", "sqrt", "root", "sin", "cos", "tan", "log", "ln", "exp", "inf", "infinity", "minus", "negative", "plus")
)
ALTERNATIVES = frozenset(("or", "either", "neither", "nor", "between", "versus", "vs", "wrong", "incorrect", "false"))
VALUE_WORDS = NUMBER_WORDS | MULTIPLIERS | MATHEMATICS | ALTERNATIVES
# Words that do so somewhere before a number; behind it they are about something else ("5 left, not more").
DENIALS = frozenset(
    (
        *("not", "never", "except", "isn", "aren", "wasn", "weren", "doesn", "don", "didn", "cannot", "couldn"),
        *("won", "ain"),
    )
)
# Words that do so right before a number: what is more than 12 is not 12.
COMPARISONS = frozenset(
    (
        *("than", "least", "most", "over", "under", "above", "below", "beyond", "exceeds", "exceeding", "almost"),
        *("nearly", "twice", "thrice", "double", "triple", "times", "no", "without", "until", "before", "after"),
    )
)
# ... and these with an "of" between.
PARTS = frozenset(
    (
        *("third", "quarter", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "thirds", "quarters"),
        *("out", "square", "cube", "power", "multiple", "factor", "sum", "product", "fraction", "part", "twice"),
    )
)
_AND_A_PART = re.compile(r"\b(?:a|one)\s{1,3}(?:third|quarter|fourth|fifth|sixth|eighth|tenth)\b", re.IGNORECASE)
# Chinese and Japanese ones touch their number.
_EASTERN_MULTIPLIERS = frozenset("\u5341\u767e\u5343\u4edf\u4e07\u842c\u4ebf\u5104\u5146")
_EASTERN_MINUSES = ("\u8d1f", "\u8ca0")

_RELATION = re.compile(r"[!<>\u2260\u2264\u2265~\u2248]\s*$|\\(?:ne|neq|not|le|leq|ge|geq|approx|sim)\b")
_NEXT_EQUATION = re.compile(r"[;\n]|,(?!\d{3})|\b(?:and|or)\b")
_OPERATION = re.compile(r"[^\W_]\s{0,3}[*/]\s{0,3}$|-\s{0,3}$")


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

    Of an equation it is what stands after the last `=`: `5 + 7 = 12` and `x = 12` give 12. Words, units, currency
    signs, `%`, punctuation, `\boxed{...}`, `\text{...}` and `$...$` may stand around the number. Mixed numbers
    (`3 1/2`), grouped digits (`1,000`, `1 000`, `1{,}000`, `1,00,000`), and a minus as a word or a dash are read as
    what they mean.

    What changes the value may not be there: `\sqrt{13}` is not 13, and `5!`, `5x`, `x^5`, `5\pi`, `5 million`, `5k`,
    `5 dozen`, `(5,\infty)`, `not 5`, `5 or six`, `at least 5` and `half of 5` are not 5.

    Args:
        text (`str` or `None`):
            The answer.

    Returns:
        `Fraction` or `None`:
            The number, within the bounds of [`parse_number`]. Never raises, and takes linear time.
    """
    if text is None or len(text) > MAX_ANSWER_LENGTH:
        return None
    *left_sides, text = _as_plain_digits(text).split("=")
    if left_sides and not _is_one_equation(left_sides):
        return None
    numbers = list(islice(NUMBER.finditer(text), 2))
    if len(numbers) != 1:
        return None
    number = numbers[0]
    before, after = SHOWING.sub(" ", text[: number.start()]), text[number.end() :]
    touching = WORD.match(after)
    after = SHOWING.sub(" ", after)
    if not AROUND.fullmatch(before) or not AROUND.fullmatch(after) or after.lstrip().startswith("!"):
        return None
    if before[-1:].isalnum() and (before[-1:] in _EASTERN_MINUSES or _is_latin(before[-1:])):
        return None
    if touching and _is_latin(touching[0]) and _may_be_factor(touching[0], min_letters=3):
        return None
    if after[:1] in _EASTERN_MULTIPLIERS or _OPERATION.search(before[-8:]) or _AND_A_PART.search(after):
        return None
    if any(word.lower() in DENIALS for word in WORD.findall(before)):
        return None
    for word in (*WORD.findall(before), *WORD.findall(after)):
        if word.lower() in VALUE_WORDS or (_is_latin(word) and _may_be_factor(word, min_letters=2)):
            return None
    return None if _is_compared(WORD.findall(before.lower())) else _match_to_fraction(number)


def _as_plain_digits(text: str) -> str:
    """The same with every number in the one form that `NUMBER` knows."""
    text = _IN_WORDS.sub("-", text.translate(_MINUSES)).replace("{,}", ",")
    text = _SPACED.sub(_without_separators, text)
    text = _INDIAN.sub(_without_separators, text)
    text = _MIXED.sub(_as_fraction, text)
    return _SHORT_FRACTION.sub(r"\\\1frac{\2}{\3}", text)


def _without_separators(match: re.Match[str]) -> str:
    return _NO_DIGIT.sub("", match[0])


def _as_fraction(match: re.Match[str]) -> str:
    """A mixed number as a fraction; as it is where that is none, or too long to reckon with."""
    sign, whole, *parts = match.groups()
    numerator, denominator = (part for part in parts if part is not None)
    if len(match[0]) > MAX_DIGITS or not int(denominator):
        return match[0]
    return f"{sign}{int(whole) * int(denominator) + int(numerator)}/{int(denominator)}"


def _is_one_equation(left_sides: list[str]) -> bool:
    """Whether what stands before the last `=` is one claim, which nothing denies."""
    return not (
        any(_RELATION.search(side) for side in left_sides)
        or any(_NEXT_EQUATION.search(side) for side in left_sides[1:])
        or any(word in DENIALS | ALTERNATIVES for side in left_sides for word in WORD.findall(side.lower()))
    )


def _is_compared(words_before: list[str]) -> bool:
    if words_before[-1:] == ["of"]:
        return words_before[-2:-1] != [] and words_before[-2] in PARTS
    return words_before != [] and words_before[-1] in COMPARISONS


def _may_be_factor(word: str, min_letters: int) -> bool:
    return len(word) < min_letters and word not in UNITS and word not in ARTICLES


def _is_latin(word: str) -> bool:
    """Whether single letters stand for variables in this script; a Chinese word may have one."""
    return word[0] < "\u0590" or not word[0].isalpha()


def parse_plain_number(text: str) -> Fraction | None:
    r"""The number that a text is as a whole, or `None` if it is anything else or more.

    A sign, currency signs, grouped digits, decimals, `%`, powers of ten, simple fractions and mixed numbers, a
    trailing period, and `\boxed{...}` or `$...$` around it all are part of a number; words, units and the rest of
    mathematics are not: `\sqrt{13}`, `(2,\infty)`, `2^{10}` and `72 apples` have numbers in them and are none.

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
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    match = PLAIN_NUMBER.fullmatch(_as_plain_digits(text))
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
