r"""Correctness of answers that are mathematics: `\frac12` for `0.5`, `(x+1)^2` for `x^2+2x+1`, by math-verify.

What math-verify does with an answer takes as long as the answer's author likes: `9^{9^{9}}` stops a process for hours,
its other threads with it. So it runs in processes of our own, with a deadline for each answer.
"""

import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._base import Tag, check_score
from .correctness import AnswerReward, check_numeric, is_same_number
from .extract import extract_boxed_answer
from .extractors import AnswerExtractor
from .numbers import MAX_ANSWER_LENGTH, MULTIPLIERS, WORD
from .worker_pool import check_pool_options, shared_pool


# The share of completions with a reference that could not be scored, as a metric.
UNSCORED = "rewards/unscored"
# Numbers that are the same only if they are written alike.
WHOLE_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})", re.ASCII)
BASE = re.compile(r"[0-9A-Za-z]_\{?\s*([0-9]+)\s*\}?\s*\$?\Z", re.ASCII)
# On the left of an equation: it says more than what something is called, and its right side does not stand for it.
OPERATION = re.compile(r"[+*/^]|(?<=[^\s<>!])\s*-|\\[dt]?frac|\\cdot|\\times|\\sqrt")
VECTOR = re.compile(r"\\(?:mathbf|boldsymbol|vec|hat)\s*\{?\s*\\?([A-Za-z])", re.ASCII)
LATEX_AROUND = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"))
VERIFIER = f"{__name__}:make_verifier"


@dataclass(frozen=True, kw_only=True)
class MathCorrectnessReward(AnswerReward):
    """See [`get_math_correctness_reward`]."""

    exact_score: float
    numeric_score: float
    symbolic_score: float
    wrong_score: float
    numeric: str
    timeout_s: float
    workers: int | None
    memory_limit_mb: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("exact_score", "numeric_score", "symbolic_score", "wrong_score"):
            check_score(self.name, option, getattr(self, option))
        check_numeric(self.name, self.numeric)
        check_pool_options(self.name, self.timeout_s, self.workers, self.memory_limit_mb)
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(f"{self.name} needs math-verify: pip install 'trl_grpo_ext[math]'")

    @property
    def full_marks(self) -> float:
        return self.exact_score

    def grade(self, extracted: str | None, reference: str) -> float | None:
        return self.grade_batch([(extracted, reference)])[0][0]

    def is_correct(self, extracted: str | None, reference: str) -> bool:
        return self.grade_batch([(extracted, reference)])[0][1]

    def grade_batch(self, pairs: Sequence[tuple[str | None, str]]) -> list[tuple[float | None, bool]]:
        grades: list[tuple[float | None, bool] | None] = [self._grade_by_text(*pair) for pair in pairs]
        left = dict.fromkeys(pair for pair, grade in zip(pairs, grades, strict=True) if grade is None)  # each one once
        if not left:
            return [grade for grade in grades if grade is not None]
        pool = shared_pool(VERIFIER, workers=self.workers, memory_limit_mb=self.memory_limit_mb, name="math-verify")
        outcomes = pool.map([list(pair) for pair in left], self.timeout_s)
        found = {
            pair: {True: (self.symbolic_score, True), False: (self.wrong_score, False)}.get(
                outcome.value, (None, False)
            )
            for pair, outcome in zip(left, outcomes, strict=True)
        }
        return [found[pair] if grade is None else grade for pair, grade in zip(pairs, grades, strict=True)]

    def _grade_by_text(self, extracted: str | None, reference: str) -> tuple[float | None, bool] | None:
        """The grade where no mathematics is needed for it, `None` where some is."""
        if extracted == reference:
            return self.exact_score, True
        if is_same_number(self.numeric, extracted, reference):
            return self.numeric_score, True
        if not extracted or (WHOLE_NUMBER.fullmatch(extracted) and WHOLE_NUMBER.fullmatch(reference)):
            return self.wrong_score, False
        if max(len(extracted), len(reference)) > MAX_ANSWER_LENGTH:
            return None, False
        return None

    def log_metrics(
        self, grades: Sequence[tuple[float | None, bool]], log_metric: Callable[[str, float], None]
    ) -> None:
        super().log_metrics(grades, log_metric)
        log_metric(UNSCORED, sum(score is None for score, _ in grades) / max(1, len(grades)))


def get_math_correctness_reward(
    *,
    timeout_s: float = 5.0,
    workers: int | None = None,
    memory_limit_mb: int | None = 2048,
    exact_score: float = 2.0,
    numeric_score: float = 2.0,
    symbolic_score: float = 2.0,
    wrong_score: float = 0.0,
    numeric: str = "safe",
    answer_extractor: AnswerExtractor = "boxed",
    answer_tag: Tag = "answer",
    answer_column: str = "answer",
    name: str = "math_correctness_reward_func",
) -> Callable[..., list[float | None]]:
    r"""A score for an answer that is mathematically the reference, whatever either is written like.

    An answer is compared first as text, then as a number as [`get_correctness_reward`] does, and then by math-verify
    as two formulas: `\frac12`, `x^2+2x+1`, `(2,\infty)`, `\{1,2\}`, matrices, equations. Math-verify runs in worker
    processes ([`~trl_grpo_ext.rewards.worker_pool.WorkerPool`]) that are kept between calls, shared by all rewards
    with the same `workers` and `memory_limit_mb`, and end with the trainer and the process. An answer that takes
    longer than `timeout_s`, or ends its worker, is not scored (`None`), and no other answer is touched by it. Pairs of
    answer and reference that come several times in a batch are compared once.

    Not scored either is what math-verify cannot tell: a reference that it does not understand, beside an answer that
    is not the same text or number, and texts above `MAX_ANSWER_LENGTH` characters.

    Logs the extracted answers and the share of right ones as [`get_correctness_reward`] does, under the reward's name
    (`math_correctness/accuracy`), and the share of completions that could not be scored as `rewards/unscored`.

    Args:
        timeout_s (`float`, *optional*, defaults to `5.0`):
            Seconds that the comparison of one answer may take, from when a worker has begun with it.
        workers (`int`, *optional*):
            Number of worker processes; where left out, this process's share of the cores it may use.
        memory_limit_mb (`int`, *optional*, defaults to `2048`):
            MiB that a worker may take beyond what its imports need; `None` for no limit.
        exact_score (`float`, *optional*, defaults to `2.0`):
            Score where the answer equals the reference character for character.
        numeric_score (`float`, *optional*, defaults to `2.0`):
            Score where the reference is a plain number and the answer denotes the same one.
        symbolic_score (`float`, *optional*, defaults to `2.0`):
            Score where math-verify takes both for the same.
        wrong_score (`float`, *optional*, defaults to `0.0`):
            Score of everything else, a missing answer and one that is no mathematics included.
        numeric (`str`, *optional*, defaults to `"safe"`):
            When an answer is the reference's number, see [`get_correctness_reward`].
        answer_extractor (`str` or `Callable`, *optional*, defaults to `"boxed"`):
            How the answer is found, by name or by a function, see [`get_answer_extractor`].
        answer_tag (`str` or `tuple[str, str]`, *optional*, defaults to `"answer"`):
            The answer tag of the extractors that look for one.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            The dataset column with the references, see [`reference_to_text`]: bare answers, as LaTeX or as numbers.
        name (`str`, *optional*, defaults to `"math_correctness_reward_func"`):
            The callable's `__name__`.

    Returns:
        `Callable`:
            A picklable reward function, see [`get_correctness_reward`].

    Raises:
        ImportError: If math-verify is not installed.

    Example:
    ```python
    >>> reward = get_math_correctness_reward()
    >>> completions = [r"\boxed{\frac{1}{2}}", r"\boxed{2^{-1}}", r"\boxed{\frac13}", r"\boxed{9^{9^{9^9}}}"]
    >>> reward(completions=completions, answer=[r"\frac{1}{2}"] * 4)  # doctest: +SKIP
    [2.0, 2.0, 0.0, None]
    ```
    """
    return MathCorrectnessReward(
        name=name,
        answer_extractor=answer_extractor,
        answer_tag=answer_tag,
        answer_column=answer_column,
        exact_score=exact_score,
        numeric_score=numeric_score,
        symbolic_score=symbolic_score,
        wrong_score=wrong_score,
        numeric=numeric,
        timeout_s=timeout_s,
        workers=workers,
        memory_limit_mb=memory_limit_mb,
    )


# What follows runs in the workers.


def make_verifier() -> Callable[[Sequence[str]], bool | None]:
    """[`verify_pair`], with math-verify imported and made ready, which is not to count as an answer's time."""
    _math_verify()
    return verify_pair


class _OutOfResources(BaseException):
    """Carries an exception past math-verify, which takes every `Exception` for "not equal"."""


def verify_pair(pair: Sequence[str]) -> bool | None:
    """Whether an answer and a reference are the same by math-verify; `None` if it does not understand the reference.

    Without a time limit, and not to be called in a process that has something else to do.

    Raises:
        MemoryError, RecursionError: If math-verify runs out of either.
    """
    answer, reference = (_without_latex_around(text) for text in pair)
    parse, verify = _math_verify()
    try:
        gold = parse(reference)
        if all(isinstance(value, str) for value in gold):  # nothing but the text itself
            return None
        if _overlooked(answer, reference):
            return False
        return bool(verify(gold, parse(answer)))
    except _OutOfResources as error:
        raise error.args[0] from None


def _overlooked(answer: str, reference: str) -> bool:
    """Whether texts differ in what math-verify overlooks: bases, left sides of equations, "thousand", unit vectors."""
    if _multipliers(answer) != _multipliers(reference):
        return True
    if set(VECTOR.findall(reference)) - set(re.findall(r"[A-Za-z]", answer)):  # 2 for 2i
        return True
    if _base(answer) not in (None, _base(reference)):
        return True
    left, sign, _ = reference.partition("=")
    return bool(sign) and "=" not in answer and OPERATION.search(left) is not None


def _multipliers(text: str) -> list[str]:
    """Words that make another number of the one before them, which math-verify takes for units."""
    return [word for word in WORD.findall(text.lower()) if word in MULTIPLIERS]


def _base(text: str) -> str | None:
    """What `1011_2` is written in, as the index says."""
    match = BASE.search(text)
    return match[1] if match else None


def _without_latex_around(text: str) -> str:
    text = text.strip()
    for opening, closing in LATEX_AROUND:
        inner = text[len(opening) : len(text) - len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner and opening[:1] not in inner[:1]:
            if closing not in inner:
                text = inner.strip()
            break
    boxed = extract_boxed_answer(text) if text.startswith("\\boxed{") else None
    return boxed if boxed is not None and text == f"\\boxed{{{boxed}}}" else text


@functools.cache
def _math_verify() -> tuple[Callable[[str], list[Any]], Callable[[list[Any], list[Any]], bool]]:
    """Math-verify's two functions, without its own time limits, and made ready."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    math_verify = importlib.import_module("math_verify")
    for module, names in (("parser", ("latex2sympy",)), ("grader", ("simplify", "solve", "sympy_expr_eq"))):
        _let_through(importlib.import_module(f"math_verify.{module}"), names)
    # Formulas alone: looking for numbers in a text that is none would take 13 out of a reference it cannot read.
    formulas = [math_verify.LatexExtractionConfig()]

    def parse(text: str) -> list[Any]:
        found: list[Any] = math_verify.parse(f"\\boxed{{{text}}}", formulas, parsing_timeout=None)
        return found

    def verify(gold: list[Any], answer: list[Any]) -> bool:
        return bool(math_verify.verify(gold, answer, timeout_seconds=None))

    if not verify(parse(r"\sqrt{x^2+2x+1}, \frac{1}{2}"), parse(r"\frac12, \sqrt{1+x^2+2x}")):
        raise ImportError("this math-verify cannot be used: install 0.8 or newer, pip install 'trl_grpo_ext[math]'")
    return parse, verify


def _let_through(module: Any, names: Sequence[str]) -> None:
    """Change a module's functions so that those around do not take running out of memory or stack for "not equal"."""

    def changed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except (MemoryError, RecursionError) as error:
                raise _OutOfResources(error) from None

        return call

    for name in names:
        if hasattr(module, name):
            setattr(module, name, changed(getattr(module, name)))
