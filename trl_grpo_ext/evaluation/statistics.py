"""Estimators and intervals for answers: what several samples are worth, and how far a figure can be trusted.

Everything is computed over problems, because the answers to one problem are not independent of each other. All of it
is numpy; nothing here knows where the verdicts come from.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np


LEVEL = 0.95
RESAMPLES = 10_000
# Numbers that are drawn and held at once; 8 bytes each.
CHUNK = 4_000_000
# Beyond this, numbers of subsets are too large for a float.
MAX_SUBSETS = 10**300


def pass_at_k(n: Any, c: Any, k: int) -> Any:
    """The chance that one of k samples of a problem is right, from n samples of which c are.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1), `1 - C(n - c, k) / C(n, k)`: the share
    of all subsets of k samples that have a right one in them.

    Args:
        n (`int` or an array):
            Number of samples of each problem.
        c (`int` or an array):
            How many of them are right.
        k (`int`):
            Size of the subsets, at most the smallest `n`.

    Returns:
        `float`, or an array of the inputs' common shape:
            The estimates, with full precision also for large `n` and small shares.

    Raises:
        ValueError: If a number is not whole, or `1 <= k <= n` or `0 <= c <= n` does not hold.

    Example:
    ```python
    >>> pass_at_k(n=4, c=1, k=2)
    0.5
    ```
    """
    n, c = np.broadcast_arrays(_whole("n", n), _whole("c", c))
    (k,) = _whole("k", k).reshape(1)
    if n.size and (k < 1 or k > n.min()):
        raise ValueError(f"k must be from 1 to the number of samples, got k = {k} where n = {n.min()}")
    if (c < 0).any() or (c > n).any():
        raise ValueError("c must be from 0 to n: it is the number of right samples among n")
    pairs, places = np.unique(np.stack([n.ravel(), c.ravel()]), axis=1, return_inverse=True)
    estimates = np.array([_pass_at_k(int(of_n), int(of_c), int(k)) for of_n, of_c in pairs.T])
    result = estimates[places.ravel()].reshape(n.shape)
    return result if result.ndim else float(result)


def _pass_at_k(n: int, c: int, k: int) -> float:
    if n - c < k:
        return 1.0
    if c == 0:
        return 0.0
    # C(n - c, k) / C(n, k) has k factors or, written the other way round, c; by way of logarithms, because 1 minus a
    # product that is almost 1 has few digits
    few, many = min(c, k), max(c, k)
    return float(-np.expm1(np.log1p(-many / np.arange(n - few + 1, n + 1)).sum()))


def majority_at_k(classes: Sequence[Any], values: Sequence[float], k: int) -> float:
    """How often the most frequent answer among k samples of a problem is right.

    Majority voting over samples (self-consistency, Wang et al. 2022, arXiv 2203.11171), as the exact mean over all
    subsets of k of the n samples: by counting, not by drawing. Where several answers are equally frequent, a subset is
    worth their mean. Samples without an answer do not vote; a subset in which none has one is worth 0.

    Args:
        classes (`Sequence`):
            Each sample's answer, equal (and hashable) for samples that agree; `None` for a sample without one.
        values (`Sequence[float]`):
            Each sample's verdict, 0 to 1. An answer is worth the mean of its samples' verdicts.
        k (`int`):
            Number of samples that vote. Any of at most 1000 samples; fewer of more.

    Returns:
        `float`:
            The mean, 0 to 1.

    Raises:
        ValueError: If `1 <= k <= n` does not hold, or there are more than `MAX_SUBSETS` subsets.

    Example:
    ```python
    >>> majority_at_k(["14", "14", "24"], [1, 1, 0], k=3)
    1.0
    ```
    """
    n = len(classes)
    if len(values) != n:
        raise ValueError(f"there must be a verdict for each sample, got {len(values)} for {n}")
    (size,) = _whole("k", k).reshape(1)
    if not 1 <= size <= n:
        raise ValueError(f"k must be from 1 to the number of samples, got k = {size} where n = {n}")
    verdicts: dict[Any, list[float]] = {}
    for answer, value in zip(classes, values, strict=True):
        if answer is not None:
            verdicts.setdefault(answer, []).append(float(value))
    counts = tuple(sorted(map(len, verdicts.values())))
    if size == n:  # one subset: nothing to count
        winners = [math.fsum(found) / len(found) for found in verdicts.values() if len(found) == counts[-1]]
        return math.fsum(winners) / len(winners) if winners else 0.0
    # One count for all the usual sizes: most figures ask for few of the samples, and few cost little.
    most = next(limit for limit in (min(64, n // 2), min(64, n), n // 2, n) if size <= limit)
    if math.comb(n, min(most, n // 2)) > MAX_SUBSETS:
        raise ValueError(f"there are too many subsets of {size} of {n} samples to count: ask for fewer samples")
    wins = _wins(counts, n, most)
    worth = (wins[len(found)][size] * (math.fsum(found) / len(found)) for found in verdicts.values())
    return min(1.0, math.fsum(worth))


@lru_cache(maxsize=4096)
def _wins(counts: tuple[int, ...], n: int, most: int) -> dict[int, np.ndarray]:
    """For each number of samples in `counts`, how often a class of so many wins, by the number of samples that vote.

    A win that is shared by r classes counts 1/r. Subsets are counted with polynomials in x, whose exponent is the size
    of the subset, and in y, whose exponent is the number of classes that tie: a class of c samples of which s are in
    the subset is the term `C(c, s) x^s`, and has y beside it where s is the winning number.

    Args:
        counts (`tuple[int, ...]`):
            Number of samples of each class, in ascending order.
        n (`int`):
            Number of all samples, those without a class included.
        most (`int`):
            Largest number of samples that vote.
    """
    distinct = sorted(set(counts))
    wins = np.zeros((len(distinct), most + 1))
    for winning in range(1, min(most, max(counts, default=0)) + 1):
        reaching = [count for count in counts if count >= winning]
        ties = np.arange(len(reaching) + 1)
        # Coefficients by ties and size. At first of the classes that cannot reach the winning number, and of samples
        # without a class: all their subsets.
        product = np.zeros((len(ties), most + 1))
        product[0] = _binomials(n - sum(reaching), n, most)
        # The same, but only where a class of this number of samples is among the winners.
        marked = np.zeros((len(distinct), len(ties), most + 1))
        for done, count in enumerate(reaching, start=1):
            below = _multiplication(_binomials(count, winning - 1, most))
            at = _multiplication(_binomials(count, winning, most) - _binomials(count, winning - 1, most))
            winner, marked_winner = product[:done] @ at, marked[:, :done] @ at
            product[:done] = product[:done] @ below
            product[1 : done + 1] += winner
            marked[:, :done] = marked[:, :done] @ below
            marked[:, 1 : done + 1] += marked_winner
            marked[distinct.index(count), 1 : done + 1] += winner
        wins += (marked / np.maximum(ties, 1)[:, None]).sum(axis=1)
    subsets = _binomials(n, n, most)
    return {count: wins[row] / (subsets * counts.count(count)) for row, count in enumerate(distinct)}


def _multiplication(coefficients: np.ndarray) -> np.ndarray:
    """The matrix that multiplies polynomials on its left by this one; higher powers are dropped."""
    padded = np.concatenate([coefficients, np.zeros(len(coefficients))])
    return padded[_differences(len(coefficients))]


@lru_cache(maxsize=16)
def _differences(size: int) -> np.ndarray:
    """Column minus row; the negative ones index the end of a list."""
    return np.arange(size) - np.arange(size)[:, None]


@lru_cache(maxsize=4096)
def _binomials(count: int, limit: int, degree: int) -> np.ndarray:
    """Coefficients of x^0 to x^degree: the ways to take that many, at most `limit`, of `count` samples."""
    return np.array([float(math.comb(count, size)) if size <= limit else 0.0 for size in range(degree + 1)])


def wilson_interval(successes: Any, n: Any, level: float = LEVEL) -> tuple[Any, Any]:
    """Wilson's score interval for a share (Wilson 1927), without a continuity correction.

    Args:
        successes (`int` or an array):
            How many of `n` independent trials succeeded.
        n (`int` or an array):
            Number of trials.
        level (`float`, *optional*, defaults to `0.95`):
            The interval's level.

    Returns:
        `tuple`:
            Lower and upper bound, as floats or arrays. They are informative also where no trial or each one succeeded.

    Raises:
        ValueError: If a number is not whole, `n` is not positive, or there are more successes than trials.

    Example:
    ```python
    >>> "{:.2f} to {:.2f}".format(*wilson_interval(93, 100))
    '0.86 to 0.97'
    ```
    """
    successes, n = np.broadcast_arrays(_whole("successes", successes), _whole("n", n))
    if (n < 1).any():
        raise ValueError(f"n must be at least 1, got {n.min()}: there is no share of nothing")
    if (successes < 0).any() or (successes > n).any():
        raise ValueError("successes must be from 0 to n")
    z = _quantile(level)
    share = successes / n
    centre = share + z**2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n.astype(float) ** 2))
    scale = 1 + z**2 / n
    low = np.where(successes == 0, 0.0, np.clip((centre - half) / scale, 0, 1))
    high = np.where(successes == n, 1.0, np.clip((centre + half) / scale, 0, 1))
    return (low, high) if low.ndim else (float(low), float(high))


def bootstrap_interval(
    values: Any,
    *,
    sizes: Any = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    are_shares: bool = True,
) -> tuple[Any, Any]:
    """The percentile bootstrap's interval for a mean over problems (Efron and Tibshirani 1993, chapter 13).

    Problems are drawn with replacement, as many as there are; the interval is between quantiles of the means. The same
    values give the same interval, whatever their order.

    Args:
        values (array of shape `(problems,)` or `(figures, problems)`):
            Each problem's value. Several figures are resampled together: with the same problems each time.
        sizes (array of shape `(problems,)`, *optional*):
            Each problem's weight in the mean, such as its number of answers. Default: the same for all.
        level (`float`, *optional*, defaults to `0.95`):
            The interval's level.
        resamples (`int`, *optional*, defaults to `10_000`):
            How often problems are drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        are_shares (`bool`, *optional*, defaults to `True`):
            Whether the values are shares from 0 to 1. Where each one is 0, or each is 1, all resamples are the same,
            and the bootstrap says that the figure is certain; then the bounds are Wilson's, for as many trials as
            there are problems.

    Returns:
        `tuple`:
            Lower and upper bound, as floats or as arrays of shape `(figures,)`.

    Raises:
        ValueError: If there are no values, or one is not finite.
    """
    values = _finite(values)
    rows = np.atleast_2d(values)
    num_problems = rows.shape[1]
    rows = np.concatenate([rows, _finite(np.ones(num_problems) if sizes is None else sizes).reshape(1, num_problems)])
    # Problems with the same values are drawn together, which is quicker by far and makes their order irrelevant.
    rows, counts = np.unique(rows, axis=1, return_counts=True)
    rows, weights = rows[:-1], rows[-1]
    random = np.random.default_rng(seed)
    means = np.empty((resamples, len(rows)))
    chunk = max(1, CHUNK // len(counts))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = random.multinomial(num_problems, counts / num_problems, size=size) * weights
        means[start : start + size] = drawn @ rows.T / drawn.sum(axis=1, keepdims=True)
    tail = (1 - _level(level)) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    is_same = (rows == rows[:, :1]).all(axis=1)
    low[is_same] = high[is_same] = rows[is_same, 0]  # without rounding
    if are_shares:
        for share in (0, 1):
            is_certain = is_same & (rows[:, 0] == share)
            low[is_certain], high[is_certain] = wilson_interval(share * num_problems, num_problems, level)
    return (low, high) if values.ndim > 1 else (float(low[0]), float(high[0]))


def paired_bootstrap(
    a: Any, b: Any, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Any, Any, Any]:
    """The difference of two means over the same problems, and its interval: problems are drawn in pairs.

    Args:
        a (array of shape `(problems,)` or `(figures, problems)`):
            Each problem's value from 0 to 1, in the first set.
        b (array of the same shape):
            In the second one.
        level, resamples, seed:
            See [`bootstrap_interval`].

    Returns:
        `tuple`:
            The mean of `b` minus that of `a`, and its lower and upper bound, as floats or arrays. Where the two are
            the same in every problem, the bounds are what Wilson's upper bound leaves possible on either side.

    Raises:
        ValueError: If the shapes differ, there are no values, or one is not from 0 to 1.
    """
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must be values of the same problems, got shapes {a.shape} and {b.shape}")
    if min(a.min(), b.min()) < 0 or max(a.max(), b.max()) > 1:
        raise ValueError("values must be from 0 to 1")
    differences = np.atleast_2d(b - a)
    low, high = bootstrap_interval(differences, level=level, resamples=resamples, seed=seed, are_shares=False)
    num_problems = differences.shape[1]
    possible = wilson_interval(0, num_problems, level)[1]
    for row, of_figure in enumerate(differences):
        if (of_figure == of_figure[0]).all() and of_figure[0] in (-1, 0, 1):
            low[row] = max(-1, of_figure[0] - possible)
            high[row] = min(1, of_figure[0] + possible)
    difference = np.array([math.fsum(of_figure) / num_problems for of_figure in differences])
    return (difference, low, high) if a.ndim > 1 else (float(difference[0]), float(low[0]), float(high[0]))


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: how likely so uneven a split is if neither of two sets is better.

    Two-sided binomial test of a half (McNemar 1947, in its exact form) on the problems that one set has right and the
    other has not; those on which they agree say nothing.

    Args:
        only_a (`int`):
            Problems right in the first set alone.
        only_b (`int`):
            Problems right in the second set alone.

    Returns:
        `float`:
            The p-value; 1.0 where they agree on every problem.

    Raises:
        ValueError: If a number is negative or not whole.
    """
    first, second = (int(_whole(name, count)) for name, count in (("only_a", only_a), ("only_b", only_b)))
    if min(first, second) < 0:
        raise ValueError(f"only_a and only_b must not be negative, got {first} and {second}")
    n = first + second
    ways = term = 1
    for size in range(min(first, second)):
        term = term * (n - size) // (size + 1)
        ways += term
    return min(1.0, 2 * ways / 2**n)


def _whole(name: str, numbers: Any) -> np.ndarray:
    found = np.asarray(numbers)
    if found.dtype.kind not in "iuf" or not np.isfinite(found).all() or (found != np.floor(found)).any():
        raise ValueError(f"{name} must be whole, got {numbers!r}"[:200])
    return found.astype(np.int64)


def _finite(values: Any) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if found.size == 0:
        raise ValueError("there are no values")
    if not np.isfinite(found).all():
        raise ValueError("values must be finite numbers")
    return found


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return level


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + _level(level)) / 2)
