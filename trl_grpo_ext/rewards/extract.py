"""From a text to the answer it gives, or `None`. Grading that answer is `correctness.py`'s work.

Every function is linear in the length of its text and raises on no text.
"""

import re
from collections import deque

from ._base import Tag, to_tag_pair


# One number as people and models write it. Each alternative is possessive and can fail only after a bounded or a
# single scan, so that a search over a whole text stays linear.
_SIGN = r"[-+\u2212]"  # \u2212 is the Unicode minus
CURRENCY = r"\\?[$\u00a2-\u00a5\u20a0-\u20c0]"  # cent, pound, yen and the block of currency signs; LaTeX escapes $
_DECIMAL = r"(?:\d++(?:\.\d++)?+|\.\d++)"
NUMBER = re.compile(
    rf"""
    (?:(?P<outer_sign>{_SIGN}){CURRENCY}[ ]?)?+    # -$5
    (?P<sign>{_SIGN}?+)                             # $-5
    (?:
        \\[dt]?frac\{{(?P<latex_numerator>{_SIGN}?\d++)\}}\{{(?P<latex_denominator>\d++)\}}
      | (?P<numerator>\d++)[ ]?+/[ ]?+(?P<denominator>\d++)(?!\.\d|[ ]?/[ ]?\d)
      | (?<!\d,)(?P<thousands>[1-9]\d{{0,2}}+(?:,\d{{3}})++)(?!\d|,\d)(?P<thousands_decimals>(?:\.\d++)?+)
      | (?P<mantissa>{_DECIMAL})[eE](?P<exponent>{_SIGN}?\d++)(?!\w)
      | (?P<decimal>{_DECIMAL})
    )
    """,
    re.VERBOSE,
)

# The command that LaTeX boxes a result with, and what its argument is made of.
_BOXES = tuple(re.compile(rf"\\{command}(?![a-zA-Z])\s*+") for command in ("boxed", "fbox"))
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text
_END_OF_BARE_BOX = re.compile(r"[$\n]|\\[)\]]")

# What the system prompt shows where the answer should stand.
PLACEHOLDER = "..."

# What stands before the final answer in GSM8K's own solutions.
HASH_MARKER = "####"

# What ends the reasoning of DeepSeek-R1, Qwen3 and their like.
END_OF_THINKING = "</think>"


def extract_xml_answer(text: str, tag: Tag = "answer") -> str:
    """The text after the last `<answer>` and before the first `</answer>` that follows, stripped.

    `tag` is the tag's name, or its opening and closing texts, see [`extract_tagged_answer`].

    Where a tag is missing the text simply runs on: without any tag this is the whole text, stripped. This is the rule
    that the GSM8K notebooks use, so it is lenient; [`extract_tagged_answer`] is not.

    Example:
    ```python
    >>> extract_xml_answer("<answer> 24 </answer>"), extract_xml_answer("24")
    ('24', '24')
    ```
    """
    opening, closing = to_tag_pair("extract_xml_answer", "tag", tag, open_ended=True)
    return _between(text, opening, closing)[0]


def extract_tagged_answer(text: str, tag: Tag = "answer") -> str | None:
    """The stripped text inside the last `<answer>`, or `None` if that is not closed or holds the placeholder `...`.

    `tag` is the tag's name, or its opening and closing texts: `("<SOLUTION>", "</SOLUTION>")`. One of the two may be
    empty: `("Answer:", "")` is all that follows the last `Answer:`.

    Example:
    ```python
    >>> extract_tagged_answer("<answer> 24 </answer>")
    '24'
    >>> extract_tagged_answer("<answer> 24") is None
    True
    ```
    """
    opening, closing = to_tag_pair("extract_tagged_answer", "tag", tag, open_ended=True)
    answer, is_whole = _between(text, opening, closing)
    if not is_whole or answer == PLACEHOLDER or not (closing or answer):
        return None
    return answer


def _between(text: str, opening: str, closing: str) -> tuple[str, bool]:
    """What the last tag holds, stripped, and whether both of its texts are there; an empty one always is."""
    opened = closed = "always"
    if opening:
        _, opened, text = text.rpartition(opening)
    if closing:
        text, closed, _ = text.partition(closing)
    return text.strip(), bool(opened and closed)


def extract_answer_after_thinking(text: str) -> str | None:
    """What follows the last `</think>`, stripped; `None` without it, or where nothing follows.

    Templates of reasoning models often write the opening `<think>` themselves, so that completions have none. Where a
    model thinks several times, what it says in between is no answer. A box or a tag in what follows is left as it is:
    `answer_extractor=("think", "boxed")` opens it, see [`get_answer_extractor`].

    Example:
    ```python
    >>> extract_answer_after_thinking("2 + 2 x 6 = 14</think>The answer is 14.")
    'The answer is 14.'
    ```
    """
    _, closed, rest = text.rpartition(END_OF_THINKING)
    return (rest.strip() or None) if closed else None


def extract_hash_answer(text: str) -> str | None:
    r"""What GSM8K's own solutions give after their last `####`, to the end of the line; `None` without it.

    Example:
    ```python
    >>> extract_hash_answer("2 + 2 x 6 = 14\n#### 14")
    '14'
    ```
    """
    _, marker, rest = text.rpartition(HASH_MARKER)
    answer = rest.partition("\n")[0].strip()
    return answer if marker and answer else None


def extract_boxed_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, as MATH's solutions give their answers; `None` without it.

    Braces within are balanced, escaped ones (`\{`) aside, and of boxes within a box the innermost counts. Without
    braces (`\boxed 5`) it is what follows, to the end of the formula or line. `\fbox` counts where there is no
    `\boxed`. A box that is not closed, is empty or holds the placeholder `...` gives no answer.

    Example:
    ```python
    >>> extract_boxed_answer(r"so it is $\boxed{\frac{3}{4}}$")
    '\\frac{3}{4}'
    ```
    """
    for command in _BOXES:
        last = deque(command.finditer(text), maxlen=1)
        if last:
            answer = _boxed_from(text, last[0].end()).strip()
            return None if answer in ("", PLACEHOLDER) else answer
    return None


def _boxed_from(text: str, start: int) -> str:
    """The argument of the command that ends here; empty if it is not closed."""
    if not text.startswith("{", start):
        end = _END_OF_BARE_BOX.search(text, start)
        return text[start : end.start() if end else len(text)]
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return ""


def extract_last_number(text: str) -> str | None:
    """The last number in the text as it stands there (`"1,080"`, `"-3/4"`), or `None` if there is none.

    Example:
    ```python
    >>> extract_last_number("from 12 to 1,080 apples")
    '1,080'
    ```
    """
    last = deque(NUMBER.finditer(text), maxlen=1)
    return last[0].group() if last else None
