r"""Is a completion's answer the reference's? Under four conventions, side by side.

What an accuracy is depends on where the answer is looked for, by tens of points for some models; so each figure names
its convention. The first two are this package's own. Both find an answer right if it is the reference's text, or if
the reference is a plain number and the answer denotes the same one, with words, units or LaTeX around it, see
[`is_reference_number`]; they differ in where they look:

- `strict`: inside the last `<answer>`, if that is closed and not empty. What training with this package's rewards asks
  for: it rises as a policy learns the format, without one more problem solved.
- `answer`: the first of these that gives one: the closed answer tag, as above; the last `\boxed{...}`; what follows
  the last `####`, to the end of the line; the last number of the text. What a reader would take for the answer,
  whatever the format: use it to see whether a policy solves more problems, and to compare models of different styles.

The other two are the filters `strict-match` and `flexible-extract` of the task `gsm8k` (version 3) in EleutherAI's
lm-evaluation-harness, with its metric `exact_match`. Use them to put figures beside published ones. A published figure
is made with the harness's prompt as well, which grading cannot see: 5 worked examples before the question by default,
`Question: ...\nAnswer:` as the text, greedy decoding, and the end of the completion before the next `Question:`.

- `lm_eval_strict`: the first `#### ` that a number follows: a minus and then digits, periods and commas.
- `lm_eval_flexible`: the last stretch of two or more of `$0123456789.,`, or of a single digit, a minus before it
  included. The stretch need not be a number: in `It is 18. Really ...` it is `...`.

Of the extracted text and of the reference then go, in this order, all commas, all dollar signs, all up to the last
`#### `, and one period at the end, also before a last line break; what is left must be equal, capitals aside. So `18.`
is 18, and `18.00` and `18..` are not. `####18`, `#### $18` and `#### +18` give no answer to the strict filter, and a
Unicode minus is overlooked by the flexible one. Where a filter finds nothing, it gives `[invalid]`. NUL characters at
the end do not count, because the harness compares arrays of numpy. Its own regular expressions take quadratic time on
some texts; the rules here are linear.

References may be texts, GSM8K's solutions (of which the last `#### ` gives the answer) or numbers of any kind, see
[`reference_to_text`]. A text stands before the harness's metric as it is.
"""

import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from ..rewards.extract import (
    HASH_MARKER,
    extract_boxed_answer,
    extract_hash_answer,
    extract_last_number,
    extract_tagged_answer,
)
from ..rewards.numbers import is_reference_number
from ..rewards.references import reference_to_text
from ..rewards.text import completion_to_text


CONVENTIONS = ("strict", "answer", "lm_eval_strict", "lm_eval_flexible")

# What the harness's filters give where they find nothing.
INVALID = "[invalid]"
_HARNESS_MARKER = f"{HASH_MARKER} "
_AFTER_MARKER = re.compile(rf"{_HARNESS_MARKER}(-?[0-9.,]+)")
_STRETCH = re.compile(r"-?(?:[$0-9.,]{2,}+|[0-9])")


@dataclass(frozen=True)
class Grade:
    """What was found in a completion, and whether it is right.

    Args:
        extracted (`dict[str, str | None]`):
            By convention the answer as it stands in the text, `None` if there is none; the harness's conventions say
            `[invalid]` for that.
        correct (`dict[str, bool]`):
            By convention, whether it is the reference's.
    """

    extracted: dict[str, str | None]
    correct: dict[str, bool]


def grade(completion: Any, reference: Any) -> Grade:
    r"""Grade one completion under every convention.

    Args:
        completion (`str` or messages):
            The completion, in any of the forms that [`completion_to_text`] takes.
        reference (`str` or a number):
            The right answer, see [`reference_to_text`].

    Returns:
        `Grade`:
            What was extracted, and the verdicts. No completion makes it raise, and it takes linear time.

    Raises:
        ValueError: If there is nothing to compare with in `reference`.

    Example:
    ```python
    >>> grade("It is 24.\n#### 24", "24").correct
    {'strict': False, 'answer': True, 'lm_eval_strict': True, 'lm_eval_flexible': True}
    ```
    """
    right = reference_to_text(reference)
    if right is None:
        raise ValueError(f"the reference is {str(reference)[:60]!r}, and must be a text or a number")
    text = completion_to_text(completion)
    extracted = {
        "strict": extract_strict(text),
        "answer": extract_answer(text),
        "lm_eval_strict": extract_lm_eval_strict(text),
        "lm_eval_flexible": extract_lm_eval_flexible(text),
    }
    harness_right = _normalise(reference if isinstance(reference, str) else right)
    correct = {}
    for convention, given in extracted.items():
        if convention.startswith("lm_eval"):
            correct[convention] = _normalise(given or "") == harness_right
        else:
            correct[convention] = given is not None and (given == right or is_reference_number(given, right))
    return Grade(extracted, correct)


def extract_strict(text: str) -> str | None:
    """The text in the last answer tag, if that is closed and not empty."""
    return extract_tagged_answer(text) or None


def extract_answer(text: str) -> str | None:
    """The answer in the first place that has one: the answer tag, the last box, behind `####`, the last number."""
    for extract in (extract_strict, extract_boxed_answer, extract_hash_answer, extract_last_number):
        answer = extract(text)
        if answer is not None:
            return answer
    return None


def extract_lm_eval_strict(text: str) -> str:
    """What the harness's filter `strict-match` gives."""
    found = _AFTER_MARKER.search(text)
    return found[1] if found else INVALID


def extract_lm_eval_flexible(text: str) -> str:
    """What the harness's filter `flexible-extract` gives."""
    last = deque(_STRETCH.finditer(text), maxlen=1)
    return last[0][0] if last else INVALID


def _normalise(text: str) -> str:
    """What the harness's metric compares of a text."""
    for marker in (",", "$"):
        text = text.replace(marker, "").rstrip("\0")
    text = text.rpartition(_HARNESS_MARKER)[2].rstrip("\0")
    if text.endswith((".", ".\n")):
        text = text.removesuffix("\n").removesuffix(".") + ("\n" if text.endswith("\n") else "")
    return text.rstrip("\0").lower()
