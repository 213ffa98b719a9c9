"""Rewards for the answer: is it the reference's, character for character or as a number?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._base import Reward, Tag, check_score, to_tuple
from .extractors import AnswerExtractor, check_answer_extractor, completion_giving, extract_answer
from .numbers import is_reference_number, numerically_equal
from .references import reference_to_text
from .text import completion_to_text


# Rules by which an answer is the reference's number, by the name that the option `numeric` has for them.
NUMERIC_RULES: dict[str, Callable[[str | None, str], bool]] = {
    "safe": is_reference_number,
    "seed": numerically_equal,
}


def check_numeric(reward: str, numeric: str) -> None:
    """Raise `ValueError` unless there is a rule of this name."""
    if numeric not in NUMERIC_RULES:
        raise ValueError(f"{reward}: numeric must be one of {', '.join(NUMERIC_RULES)}, got {numeric!r}")


def is_same_number(numeric: str, given: str | None, reference: str) -> bool:
    """Whether an answer is the reference's number by the rule of this name."""
    return NUMERIC_RULES[numeric](given, reference)


@dataclass(frozen=True, kw_only=True)
class AnswerReward(Reward):
    """A reward that compares the completion's answer with a column of the data set."""

    answer_column: str
    answer_extractor: AnswerExtractor
    answer_tag: Tag

    def __post_init__(self) -> None:
        super().__post_init__()
        check_answer_extractor(self.name, self.answer_extractor, self.answer_tag)
        for option in ("answer_extractor", "answer_tag"):
            object.__setattr__(self, option, to_tuple(getattr(self, option)))
        if not isinstance(self.answer_column, str) or not self.answer_column:
            raise ValueError(f"{self.name}: answer_column must be a column's name, got {self.answer_column!r}")

    def completion_giving(self, answer: str) -> str | None:
        """The shortest completion that gives this answer; `None` where a function of the user's finds it."""
        return completion_giving(answer, self.answer_extractor, self.answer_tag)

    def extract(self, text: str) -> str | None:
        """The answer that a completion gives; `None` if there is none, or the user's function fails on the text."""
        return extract_answer(text, self.answer_extractor, self.answer_tag)

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
        # Where there is nothing to compare with: not scored, which is not the same as wrong.
        scores = iter(grades)
        rewards = [None if text is None else next(scores)[0] for text in texts]
        if log_extra is not None:
            log_extra(f"{self._prefix}extracted_answer", extracted)
        if log_metric is not None:
            self.log_metrics(grades, log_metric)
        return rewards

    @property
    def _prefix(self) -> str:
        """Two answer rewards in one bundle must not write into the same column, TRL would append one to the other."""
        return "" if self.name == "correctness_reward_func" else f"{self.name.removesuffix('_reward_func')}/"

    def log_metrics(
        self, grades: Sequence[tuple[float | None, bool]], log_metric: Callable[[str, float], None]
    ) -> None:
        """Log what came of the completions that have a reference."""
        correct = [is_correct for score, is_correct in grades if score is not None]
        if correct:
            log_metric(f"{self._prefix}accuracy", sum(correct) / len(correct))

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
    numeric: str

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("exact_score", "numeric_score", "wrong_score"):
            check_score(self.name, option, getattr(self, option))
        check_numeric(self.name, self.numeric)

    @property
    def full_marks(self) -> float:
        return self.exact_score

    def grade(self, extracted: str | None, reference: str) -> float:
        if extracted == reference:
            return self.exact_score
        return self.numeric_score if is_same_number(self.numeric, extracted, reference) else self.wrong_score

    def is_correct(self, extracted: str | None, reference: str) -> bool:
        return extracted == reference or is_same_number(self.numeric, extracted, reference)


def get_correctness_reward(
    *,
    exact_score: float = 2.0,
    numeric_score: float = 1.5,
    wrong_score: float = 0.0,
    numeric: str = "safe",
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
        numeric (`str`, *optional*, defaults to `"safe"`):
            When an answer is the same number: `"safe"`, where nothing in it changes the number's value, and the
            reference is a plain number ([`is_reference_number`]); `"seed"`, the first GSM8K notebooks' rule, where
            each side has one number in it, whatever stands around ([`numerically_equal`]): it pays 13 for
            `sqrt(13)`.
        answer_extractor (`str`, `Callable` or a tuple of these, *optional*, defaults to `"tag"`):
            How the answer is found, by name or by a function, see [`get_answer_extractor`]. Where a function of your
            own fails on a text, there is no answer in it.
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
        numeric=numeric,
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
        answer_extractor (`str`, `Callable` or a tuple of these, *optional*, defaults to `"xml"`):
            How the answer is found, by name or by a function, see [`get_answer_extractor`]. Where a function of your
            own fails on a text, there is no answer in it.
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
