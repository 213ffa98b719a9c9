"""From a text to the answer it gives, or `None`. Grading that answer is `correctness.py`'s work.

Every function is linear in the length of its text and raises on no text.
"""

import re
from collections import deque


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

# What the system prompt shows where the answer should stand.
PLACEHOLDER = "..."

# What opens and closes a group in LaTeX; a brace behind a backslash is a character.
_BRACE = re.compile(r"(?P<boxed>\\boxed\s*+\{)|\\[{}]|(?P<opening>\{)|(?P<closing>\})")

# What stands before the final answer in GSM8K's own solutions.
HASH_MARKER = "####"


def extract_xml_answer(text: str, tag: str = "answer") -> str:
    """The text after the last `<answer>` and before the first `</answer>` that follows, stripped.

    Where a tag is missing the text simply runs on: without any tag this is the whole text, stripped. This is the rule
    that the GSM8K notebooks use, so it is lenient; [`extract_tagged_answer`] is not.
    """
    return text.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0].strip()


def extract_tagged_answer(text: str, tag: str = "answer") -> str | None:
    """The stripped text inside the last `<answer>`, or `None` if that is not closed or holds the placeholder `...`."""
    _, opening, rest = text.rpartition(f"<{tag}>")
    answer, closing, _ = rest.partition(f"</{tag}>")
    answer = answer.strip()
    if not (opening and closing) or answer == PLACEHOLDER:
        return None
    return answer


def extract_hash_answer(text: str) -> str | None:
    """What GSM8K's own solutions give after their last `####`, to the end of the line; `None` without it."""
    _, marker, rest = text.rpartition(HASH_MARKER)
    answer = rest.partition("\n")[0].strip()
    return answer if marker and answer else None


def extract_boxed_answer(text: str) -> str | None:
    """The stripped content of the last `\\boxed{...}` that is closed, braces within it balanced; `None` without one."""
    opened: list[int | None] = []  # groups, each with where its content begins if it is a box
    begin = end = -1
    for brace in _BRACE.finditer(text):
        if brace["boxed"]:
            opened.append(brace.end())
        elif brace["opening"]:
            opened.append(None)
        elif brace["closing"] and opened:
            opening = opened.pop()
            if opening is not None and opening > begin:
                begin, end = opening, brace.start()
    return text[begin:end].strip() if begin >= 0 else None


def extract_last_number(text: str) -> str | None:
    """The last number in the text as it stands there (`"1,080"`, `"-3/4"`), or `None` if there is none."""
    last = deque(NUMBER.finditer(text), maxlen=1)
    return last[0].group() if last else None
