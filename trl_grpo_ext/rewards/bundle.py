"""Reward functions with their names and weights, in the list that `GRPOTrainer` takes."""

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from types import FunctionType
from typing import Any, SupportsIndex, TypeAlias, overload

from ._base import Tag
from .correctness import get_correctness_reward
from .extractors import AnswerExtractor
from .format import (
    get_format_reward,
    get_int_reward,
    get_soft_format_reward,
    get_strict_format_reward,
    get_xmlcount_reward,
)
from .guard import guard as put_guard
from .hardened import get_hardened_extractor, get_hardened_format_reward
from .symbolic import get_math_correctness_reward


# As in TRL: the id of a reward model, a reward model (a callable module), or a function.
RewardFunction: TypeAlias = str | Callable[..., Any]


def reward_name(reward_func: Any) -> str:
    """The name under which TRL logs a reward: a callable's `__name__`, or the last part of a model's id."""
    if isinstance(reward_func, str):
        return os.path.basename(reward_func.rstrip("/"))
    if _is_model(reward_func):
        return os.path.basename(str(reward_func.config.name_or_path).rstrip("/")) or type(reward_func).__name__
    while not hasattr(reward_func, "__name__") and hasattr(reward_func, "func"):  # functools.partial
        reward_func = reward_func.func
    return getattr(reward_func, "__name__", type(reward_func).__name__)


def _is_model(reward_func: Any) -> bool:
    return hasattr(reward_func, "forward") and hasattr(reward_func, "config")


def refuse_what_is_no_reward(reward_func: Any) -> None:
    """Raise `TypeError` for what is easily put in the place of a reward: a function that makes some, or a bundle."""
    # The rewards of this package are no plain functions, whatever else it has is.
    if isinstance(reward_func, FunctionType) and (reward_func.__module__ or "").startswith(f"{__package__}."):
        name = reward_func.__name__
        raise TypeError(f"{name} is no reward itself: pass what it makes when it is called, {name}()")
    if isinstance(reward_func, type):
        raise TypeError(f"{reward_func.__name__} is a class and no reward: pass what it makes, or a function")
    if isinstance(reward_func, RewardBundle):
        raise TypeError(f"{reward_func!r} stands inside a list of rewards: pass `bundle + [other_reward]`")


def _guarded(reward_func: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    """A function of the user's with a guard around it; this package's own rewards, models and ids as they are."""
    return reward_func if isinstance(reward_func, str) or _is_model(reward_func) else put_guard(reward_func, **options)


class RewardBundle(list):
    """A list of reward functions that knows the name and the weight of each.

    It is a list so that it can be passed as `reward_funcs` wherever TRL takes one. [`GRPOExtTrainer`] takes the
    weights as well; TRL's own trainer is told them with `GRPOConfig(reward_weights=bundle.weights)`. Weight 0 makes a
    reward a metric: computed and logged, not trained on.

    A bundle does not change. `+`, [`~RewardBundle.with_weights`] and [`~RewardBundle.select`] return new ones, and
    what would change a list in place raises `TypeError`. One write is let through because TRL cannot do without it:
    the trainer puts the loaded model where the id of a reward model stood. That model is kept in the list alone (and
    in the list of a sum); names, weights, comparisons, copies and selections still go by the id. TRL's own trainer
    also appends the reward that an environment has: pass it `list(bundle)`, as `GRPOExtTrainer` does.

    Args:
        reward_funcs (`Iterable`, *optional*):
            Reward functions, ids of reward models, or reward models.
        weights (`Iterable[float]`, *optional*):
            One weight for each; where left out 1.0 for all, or where `reward_funcs` is a bundle, that bundle's.
        guard (`bool` or `Mapping`, *optional*):
            `True`, or options of [`guard`], to put a guard around each function that is not of this package, so that
            what it fails on is not scored instead of ending the run.

    Raises:
        TypeError: If a reward function is none of the three, or a function that makes one.
        ValueError: If two have the same name (their metrics would be mixed), or the weights do not fit.

    Example:
    ```python
    >>> bundle = gsm8k_bundle().with_weights(correctness_reward_func=4.0, int_reward_func=0.0)
    >>> bundle.names[-1], bundle.weights
    ('correctness_reward_func', [1.0, 1.0, 1.0, 0.0, 4.0])

    >>> trainer = GRPOTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=bundle,
    ...     args=GRPOConfig(reward_weights=bundle.weights),
    ...     train_dataset=load_gsm8k(),
    ... )
    ```
    """

    _declared: tuple[RewardFunction, ...]
    _names: tuple[str, ...]
    _weights: tuple[float, ...]
    _has_own_weights: bool

    def __init__(
        self,
        reward_funcs: Iterable[RewardFunction] = (),
        weights: Iterable[float] | None = None,
        *,
        guard: bool | Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(reward_funcs, RewardBundle):
            if weights is None and reward_funcs._has_own_weights:
                weights = reward_funcs._weights
            reward_funcs = reward_funcs._declared
        else:
            refuse_what_is_no_reward(reward_funcs)
        if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Iterable):
            raise TypeError(f"reward_funcs must be a list of reward functions, got {reward_funcs!r}")
        declared = tuple(reward_funcs)
        for reward_func in declared:
            refuse_what_is_no_reward(reward_func)
            if not (isinstance(reward_func, str) and reward_func) and not callable(reward_func):
                raise TypeError(f"a reward must be a function, a model or a model's id, got {reward_func!r}")
        if guard is not None and not isinstance(guard, bool | Mapping):
            raise TypeError(f"guard must be True or the options of guard(), got {guard!r}")
        if guard is not None and guard is not False:
            options = {} if guard is True else dict(guard)
            declared = tuple(_guarded(reward_func, options) for reward_func in declared)
        names = tuple(map(reward_name, declared))
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two rewards of this bundle are called {name!r} and would be logged as one; leave one out with "
                    "`select`, or make it with another name (`name=` of its factory)"
                )
        self._has_own_weights = weights is not None
        weights = (1.0,) * len(declared) if weights is None else tuple(weights)
        if len(weights) != len(declared):
            raise ValueError(f"got {len(weights)} for {len(declared)} rewards, each of which needs a weight")
        for name, weight in zip(names, weights, strict=True):
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} must be a finite number, got {weight!r}")
        super().__init__(declared)
        self._declared = declared
        self._names = names
        self._weights = tuple(map(float, weights))

    @property
    def names(self) -> list[str]:
        """The rewards' names, as TRL logs them."""
        return list(self._names)

    @property
    def weights(self) -> list[float]:
        """The rewards' weights, for `GRPOConfig(reward_weights=...)`. A new list at each call."""
        return list(self._weights)

    @property
    def has_own_weights(self) -> bool:
        """Whether the weights were set, and are not 1.0 for all because nobody said anything."""
        return self._has_own_weights

    def with_weights(self, weights: Mapping[str, float] | None = None, /, **named_weights: float) -> "RewardBundle":
        """The same rewards with other weights.

        Args:
            weights (`Mapping[str, float]`, *optional*):
                Weights by name, for names that are no Python identifiers, like a model's.
            **named_weights (`float`):
                Weights by name. Rewards that are not named keep theirs.

        Raises:
            ValueError: If a name is not in the bundle; the message gives the nearest one.

        Example:
        ```python
        >>> tag_bundle().with_weights(format_reward_func=0.5).weights
        [1.0, 0.5]
        ```
        """
        changed = {**(weights or {}), **named_weights}
        for name in changed:
            self._index_of(name)
        return RewardBundle(
            self._declared,
            [changed.get(name, weight) for name, weight in zip(self._names, self._weights, strict=True)],
        )

    def select(self, *names: str) -> "RewardBundle":
        """The named rewards with their weights, in the order given.

        Raises:
            ValueError: If a name is not in the bundle; the message gives the nearest one.

        Example:
        ```python
        >>> gsm8k_bundle().select("correctness_reward_func").names
        ['correctness_reward_func']
        ```
        """
        return self._part([self._index_of(name) for name in names])

    def _part(self, indices: Iterable[int]) -> "RewardBundle":
        indices = list(indices)
        weights = [self._weights[index] for index in indices] if self._has_own_weights else None
        return RewardBundle([self._declared[index] for index in indices], weights)

    def _index_of(self, name: str) -> int:
        if name in self._names:
            return self._names.index(name)
        nearest = difflib.get_close_matches(str(name), self._names, n=1, cutoff=0.0)
        hint = f", did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"no reward is called {name!r}{hint} This bundle has: {', '.join(self._names) or 'none'}")

    def __add__(self, other: Iterable[RewardFunction]) -> "RewardBundle":  # type: ignore[override]
        if not isinstance(other, list | tuple):
            return NotImplemented
        other = other if isinstance(other, RewardBundle) else RewardBundle(other)
        has_own_weights = self._has_own_weights or other._has_own_weights
        weights = self._weights + other._weights if has_own_weights else None
        total = RewardBundle(self._declared + other._declared, weights)
        # The trainer goes through the sum of its rewards and its tools: the models it has loaded must be in there.
        for index, reward_func in enumerate([*self, *other]):
            list.__setitem__(total, index, reward_func)
        return total

    def __radd__(self, other: Iterable[RewardFunction]) -> "RewardBundle":
        if not isinstance(other, list | tuple):
            return NotImplemented
        return RewardBundle(other) + self

    def __iadd__(self, other: Iterable[RewardFunction]) -> "RewardBundle":  # type: ignore[override]
        return self + other  # `bundle += other` gives the name a new bundle

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "RewardBundle": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._part(range(*index.indices(len(self._declared))))
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        replaced = None if isinstance(index, slice) else self[index]
        if not (isinstance(replaced, str) or _is_model(replaced)) or not hasattr(value, "forward"):
            self._refuse_to_change()
        super().__setitem__(index, value)

    def _refuse_to_change(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "a RewardBundle does not change: make a new one with `+`, `select` or `with_weights`; where a trainer "
            "adds rewards of its own (environments do), pass it `list(bundle)`"
        )

    append = extend = insert = pop = remove = clear = sort = reverse = _refuse_to_change
    __delitem__ = __imul__ = __mul__ = __rmul__ = _refuse_to_change

    def copy(self) -> "RewardBundle":
        """A bundle as this one was made: with the id of a reward model where a trainer has put the loaded model."""
        return RewardBundle(self)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RewardBundle):
            return self._declared == other._declared and self._weights == other._weights
        return list(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other  # `list` has one of its own, which looks at the items alone

    __hash__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RewardBundle, (self._declared, self._weights if self._has_own_weights else None)

    def __repr__(self) -> str:
        rewards = ", ".join(f"{name}={weight:g}" for name, weight in zip(self._names, self._weights, strict=True))
        return f"RewardBundle({rewards})"


def gsm8k_bundle(
    *,
    as_in_notebooks: bool = False,
    tags: tuple[Tag, Tag] = ("reasoning", "answer"),
    answer_column: str = "answer",
    answer_extractor: AnswerExtractor = "tag",
    numeric: str = "safe",
    hardened: bool = False,
    symbolic: bool = False,
) -> RewardBundle:
    """The five rewards of the GSM8K notebooks: XML count, soft and strict format, integer, correctness.

    By default three quirks of them are mended, so that GSM8K's own solutions get full marks and no reward depends on
    the length of a right answer: the XML count does not charge a text without a final line break for its whole length,
    a text scores alike whether it ends in a line break or not, and integers may have a sign and thousands commas.

    Args:
        as_in_notebooks (`bool`, *optional*, defaults to `False`):
            Keep the quirks: the functions that are importable under the same names (`xmlcount_reward_func`, ...),
            which score as the notebooks' do.
        tags (`tuple`, *optional*, defaults to `("reasoning", "answer")`):
            The reasoning tag and the answer tag, each a name, or its opening and closing texts.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            The dataset column with the references.
        answer_extractor (`str`, `Callable` or a tuple of these, *optional*, defaults to `"tag"`):
            How the answer is found, see [`get_answer_extractor`].
        numeric (`str`, *optional*, defaults to `"safe"`):
            When an answer is the reference's number, see [`get_correctness_reward`].
        hardened (`bool`, *optional*, defaults to `False`):
            Two rewards instead of five, which cannot be had without the layout as a whole: 2.0 for it
            ([`get_hardened_format_reward`], as much as the four that it stands for), and 2.0 for the right answer in
            it ([`get_hardened_extractor`]).
        symbolic (`bool`, *optional*, defaults to `False`):
            Compare answers as mathematics too ([`get_math_correctness_reward`], which needs the extra `math`), under
            the same name and with the same scores: 1.5 for what is the reference in another form.

    Returns:
        `RewardBundle`:
            The rewards, under the same names whatever the options, but for `hardened`.

    Raises:
        ValueError: If `hardened` and `as_in_notebooks` are asked for at once.
        ImportError: If `symbolic` is asked for, and math-verify is not installed.

    Example:
    ```python
    >>> bundle = gsm8k_bundle()
    >>> len(bundle), bundle.names[-1]
    (5, 'correctness_reward_func')
    ```
    """
    if hardened and as_in_notebooks:
        raise ValueError("gsm8k_bundle: hardened and as_in_notebooks are opposites, choose one")
    answers: dict[str, Any] = {
        "answer_column": answer_column,
        "answer_extractor": answer_extractor,
        "answer_tag": tags[1],
    }
    if hardened:
        answers["answer_extractor"] = get_hardened_extractor(tags=tags, answer_extractor=answer_extractor)
    if symbolic:
        correctness = get_math_correctness_reward(
            numeric_score=1.5, symbolic_score=1.5, numeric=numeric, name="correctness_reward_func", **answers
        )
    else:
        correctness = get_correctness_reward(numeric=numeric, **answers)
    if hardened:
        return RewardBundle([get_hardened_format_reward(tags=tags), correctness])
    # in the notebooks an answer is an integer also where no tag stands around it
    integer_extractor = "xml" if answer_extractor == "tag" else answer_extractor
    return RewardBundle(
        [
            get_xmlcount_reward(tags=tags, final_newline_penalty=as_in_notebooks),
            get_soft_format_reward(tags=tags, final_newline=not as_in_notebooks),
            get_strict_format_reward(tags=tags, final_newline=not as_in_notebooks),
            get_int_reward(
                signs_and_commas=not as_in_notebooks, answer_extractor=integer_extractor, answer_tag=tags[1]
            ),
            correctness,
        ]
    )


def tag_bundle(
    *,
    tags: tuple[Tag, Tag] = ("reasoning", "answer"),
    answer_column: str = "answer",
    answer_extractor: AnswerExtractor = "tag",
    numeric: str = "safe",
) -> RewardBundle:
    """Two rewards that do not pull against each other: correctness, and 0.2 for each tag.

    Options are those of [`gsm8k_bundle`].

    Example:
    ```python
    >>> tag_bundle()
    RewardBundle(correctness_reward_func=1, format_reward_func=1)
    ```
    """
    return RewardBundle(
        [
            get_correctness_reward(
                answer_column=answer_column, answer_extractor=answer_extractor, answer_tag=tags[1], numeric=numeric
            ),
            get_format_reward(tags=tags),
        ]
    )


def math_bundle(
    *,
    tags: tuple[Tag, Tag] = ("reasoning", "answer"),
    answer_column: str = "answer",
    answer_extractor: AnswerExtractor = "tag",
) -> RewardBundle:
    """Rewards for answers that are mathematics, such as MATH's: [`get_math_correctness_reward`], and 0.2 for each tag.

    Where answers are not looked for in tags (`answer_extractor="boxed"`), the prompt is not taken to ask for any, and
    correctness is the only reward. It needs the extra `math`. Options are those of [`gsm8k_bundle`].

    Example:
    ```python
    >>> math_bundle()
    RewardBundle(correctness_reward_func=1, format_reward_func=1)
    ```
    """
    correctness = get_math_correctness_reward(
        answer_column=answer_column,
        answer_extractor=answer_extractor,
        answer_tag=tags[1],
        name="correctness_reward_func",
    )
    format_rewards = [get_format_reward(tags=tags)] if answer_extractor in ("tag", "xml") else []
    return RewardBundle([correctness, *format_rewards])
