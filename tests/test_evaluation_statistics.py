"""Estimators against closed forms, brute force over all subsets, and SciPy; intervals by how often they cover."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from trl_grpo_ext.evaluation.statistics import (
    bootstrap_interval,
    majority_at_k,
    mcnemar,
    paired_bootstrap,
    pass_at_k,
    wilson_interval,
)


# pass@k


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_pass_at_k_is_the_share_of_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [
        (200, 3, 100),
        (1000, 1, 999),
        (10_000, 17, 64),
        (10**6, 1, 1),
        (10**6, 1, 2),
        (10**6, 999_990, 3),
        (400, 200, 9),
    ],
)
def test_pass_at_k_is_precise_for_many_samples(n, c, k):
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)


def test_pass_at_k_of_many_problems():
    n, c = np.array([[4, 8, 8], [4, 5, 6]]), np.array([[0, 3, 8], [1, 5, 2]])
    values = pass_at_k(n, c, 4)
    assert values.shape == (2, 3)
    for of_n, of_c, value in zip(n.ravel(), c.ravel(), values.ravel(), strict=True):
        assert value == pytest.approx(1 - math.comb(of_n - of_c, 4) / math.comb(of_n, 4))
    assert pass_at_k(8, [0, 2, 8], 1) == pytest.approx([0, 0.25, 1])
    assert pass_at_k([], [], 3).shape == (0,)
    assert isinstance(pass_at_k(4, 2, 2), float)


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [
        *((4, 2, 5), (4, 2, 0), (4, 2, -1), (0, 0, 1), (4, 5, 2), (4, -1, 2), ([4, 2], 1, 3)),
        *((4.5, 2, 1), (4, 1.5, 1), (4, 2, 1.5), (4, math.nan, 1), (math.inf, 1, 1), ("4", 1, 1), (4, True, 1)),
    ],
)
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="must be"):
        pass_at_k(n, c, k)


# maj@k


def majority_by_brute_force(classes, values, k):
    total = Fraction(0)
    subsets = list(itertools.combinations(range(len(classes)), k))
    for subset in subsets:
        votes = {}
        for index in subset:
            if classes[index] is not None:
                votes.setdefault(classes[index], []).append(Fraction(values[index]))
        most = max(map(len, votes.values()), default=0)
        winners = [sum(found) / len(found) for found in votes.values() if len(found) == most]
        total += sum(winners) / len(winners) if winners else 0
    return float(total / len(subsets))


@pytest.mark.parametrize("seed", range(60))
def test_majority_is_the_mean_over_subsets(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 10))
    classes = [None if kind == 0 else f"class {kind}" for kind in random.integers(0, random.integers(1, 7), size=n)]
    values = [int(value) for value in random.integers(0, 2, size=n)]  # within a class, verdicts may differ
    for k in range(1, n + 1):
        assert majority_at_k(classes, values, k) == pytest.approx(
            majority_by_brute_force(classes, values, k), abs=1e-13
        )


@pytest.mark.parametrize(
    ("classes", "values", "k", "expected"),
    [
        ("aab", [1, 1, 0], 3, 1),
        ("ab", [1, 0], 2, 0.5),
        ("abc", [1, 0, 0], 3, 1 / 3),
        ("abc", [1, 0, 0], 2, 1 / 3),
        ([None, None, "a"], [0, 0, 1], 3, 1),
        ([None, None, "a"], [0, 0, 1], 2, 2 / 3),
        ([None, None], [0, 0], 1, 0),
        ([None, None], [0, 0], 2, 0),
        ("aab", [1, 0, 1], 3, 0.5),
        ([72, "x", 72], [1, 0, 1], 2, 2 / 3),  # of the three pairs one agrees on 72, and two tie
    ],
)
def test_majority_in_closed_form(classes, values, k, expected):
    assert majority_at_k(classes, values, k) == pytest.approx(expected)


def test_majority_of_two_classes_is_hypergeometric():
    """Right more often than wrong among k drawn from 40 right and 24 wrong; a tie is worth a half."""
    for k in (1, 2, 7, 16, 33, 63, 64):
        right = stats.hypergeom(64, 40, k)
        expected = sum(
            right.pmf(count) * (1 if 2 * count > k else 0.5 if 2 * count == k else 0) for count in range(k + 1)
        )
        assert majority_at_k([1] * 40 + [0] * 24, [1] * 40 + [0] * 24, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_many_samples_that_all_differ():
    assert majority_at_k(range(80), [1] * 8 + [0] * 72, 40) == pytest.approx(0.1)
    assert majority_at_k(["a"] * 1000, [1] * 1000, 100) == pytest.approx(1)
    assert majority_at_k(["a", "b"] * 2000, [1, 0] * 2000, 64) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("classes", "values", "k", "message"),
    [
        ("ab", [1, 0], 3, "k must be from 1"),
        ("ab", [1, 0], 0, "k must be from 1"),
        ("ab", [1, 0], 1.5, "k must be whole"),
        ("", [], 1, "k must be from 1"),
        ("ab", [1], 1, "a verdict for each sample"),
        (range(3000), [0] * 3000, 1000, "too many subsets of 1000 of 3000 samples"),
    ],
)
def test_majority_refuses(classes, values, k, message):
    with pytest.raises(ValueError, match=message):
        majority_at_k(classes, values, k)


# Intervals


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_wilson_is_scipys(level):
    for n in (1, 2, 10, 500, 40_000):
        for successes in {0, 1, n // 3, n - 1, n}:
            theirs = stats.binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
            assert wilson_interval(successes, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    low, high = wilson_interval([0, 5, 10], 10)
    assert low[0] == 0 < high[0]
    assert high[2] == 1 > low[2]


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, -1), (3, 2), (-1, 5), (0.5, 5), (1, 2.5), (math.nan, 5)])
def test_wilson_refuses(successes, n):
    with pytest.raises(ValueError, match="must be"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("level", [0, 1, 95, math.nan])
def test_levels(level):
    for interval in (lambda: wilson_interval(1, 2, level), lambda: bootstrap_interval([0, 1], level=level)):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            interval()


def test_bootstrap_is_scipys():
    """Both draw: their bounds differ by less than the bounds of two seeds may."""
    random = np.random.default_rng(0)
    for values in (random.random(200), random.binomial(4, 0.3, 150) / 4, random.exponential(80, 100)):
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        ours = bootstrap_interval(values, resamples=20_000, are_shares=False)
        assert ours == pytest.approx((theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low))


def test_bootstrap_of_a_mean_that_is_weighted():
    """The same as of a ratio of two means, which SciPy resamples in pairs."""
    random = np.random.default_rng(0)
    sizes = random.integers(1, 9, 150)
    values = random.binomial(sizes, 0.4) / sizes
    theirs = stats.bootstrap(
        (values * sizes, sizes),
        lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    ours = bootstrap_interval(values, sizes=sizes, resamples=20_000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.04 * (theirs.high - theirs.low))


def test_bootstrap_depends_on_nothing_but_values_and_seed(monkeypatch):
    random = np.random.default_rng(0)
    values = np.array([random.random(50), random.random(50) < 0.5])
    low, high = bootstrap_interval(values)
    order = random.permutation(50)
    assert np.array_equal(bootstrap_interval(values[:, order]), (low, high))
    assert np.array_equal(bootstrap_interval(values.tolist()), (low, high))
    assert not np.array_equal(bootstrap_interval(values, seed=1), (low, high))
    monkeypatch.setattr("trl_grpo_ext.evaluation.statistics.CHUNK", 1000)  # drawn 20 at a time, and the same
    assert np.allclose(bootstrap_interval(values), (low, high), atol=1e-12)


def test_figures_are_resampled_together():
    """The interval of a sum is that of its parts only if the same problems are drawn for all."""
    values = np.random.default_rng(0).random((2, 60))
    low, high = bootstrap_interval(np.array([values[0], 1 - values[0]]))
    assert low[0] == pytest.approx(1 - high[1])
    assert high[0] == pytest.approx(1 - low[1])


def test_where_the_bootstrap_would_say_that_a_figure_is_certain():
    assert bootstrap_interval([0.0] * 50) == wilson_interval(0, 50)
    assert bootstrap_interval([1.0] * 50) == wilson_interval(50, 50)
    assert bootstrap_interval([0.1] * 50) == (0.1, 0.1)
    assert bootstrap_interval([1.0] * 50, are_shares=False) == (1, 1)
    low, high = bootstrap_interval([[0.0] * 3, [0.0, 1, 0]])
    assert (low[0], high[0]) == wilson_interval(0, 3)
    assert (low[1], high[1]) == bootstrap_interval([0.0, 1, 0])


@pytest.mark.parametrize("values", [[], [math.nan, 1], [math.inf], [[]]])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(values)


def test_paired_bootstrap():
    random = np.random.default_rng(0)
    a = random.random(100)
    b = np.clip(a + random.normal(0.05, 0.1, 100), 0, 1)
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(b.mean() - a.mean())
    assert (low, high) == bootstrap_interval(b - a, are_shares=False)
    unpaired = math.hypot(*(np.diff(bootstrap_interval(values))[0] for values in (a, b)))
    assert high - low < unpaired / 2
    assert paired_bootstrap(b, a)[0] == pytest.approx(-difference)
    several = paired_bootstrap([a, b], [b, b])
    assert [bound[0] for bound in several] == pytest.approx([difference, low, high], abs=0.01)


def test_paired_bootstrap_where_the_sets_agree():
    possible = wilson_interval(0, 40)[1]
    assert paired_bootstrap([1.0, 0] * 20, [1.0, 0] * 20) == pytest.approx((0, -possible, possible))
    assert paired_bootstrap([0.0] * 40, [1.0] * 40) == pytest.approx((1, 1 - possible, 1))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([], [], "no values"), ([1], [1, 0], "same problems"), ([2], [1], "from 0 to 1"), ([math.nan], [0], "finite")],
)
def test_paired_bootstrap_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b)


def test_mcnemar_is_the_binomial_test():
    for a, b in [*itertools.product(range(8), range(8)), (30, 12), (500, 431), (2000, 2100)]:
        expected = stats.binomtest(a, a + b).pvalue if a + b else 1
        assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(0, 3000) == 0.5**2999 == 0
    assert mcnemar(0, 1000) == 0.5**999


@pytest.mark.parametrize("counts", [(-1, 2), (1, -1), (0.5, 2), (1, math.nan)])
def test_mcnemar_refuses(counts):
    with pytest.raises(ValueError, match="must"):
        mcnemar(*counts)


# Coverage: of many experiments with a known truth, 95 % of the intervals must hold it.

EXPERIMENTS = 3000


def coverage(low, high, truth):
    return np.mean((low <= truth) & (truth <= high))


@pytest.mark.parametrize(("n", "share"), [(500, 0.5), (500, 0.12), (200, 0.8), (100, 0.35)])
def test_wilson_covers(n, share):
    successes = np.random.default_rng(0).binomial(n, share, EXPERIMENTS)
    assert coverage(*wilson_interval(successes, n), share) == pytest.approx(0.95, abs=0.015)


def problems(random, shape):
    """Each problem's own chance of a right answer: some are hard, some easy."""
    return random.beta(0.8, 0.8, shape)


@pytest.mark.parametrize("k", [1, 4])
def test_bootstrap_covers_pass_at_k(k):
    """8 samples of each of 200 problems, which are drawn too."""
    random = np.random.default_rng(k)
    right = random.binomial(8, problems(random, (EXPERIMENTS, 200)))
    truth = 1 - np.mean((1 - problems(random, 4_000_000)) ** k)
    bounds = bootstrap_interval(pass_at_k(8, right, k), resamples=1000)
    assert coverage(*bounds, truth) == pytest.approx(0.95, abs=0.015)


def test_bootstrap_covers_a_mean_length():
    random = np.random.default_rng(0)
    bounds = bootstrap_interval(random.gamma(4, 50, (EXPERIMENTS, 200)), resamples=1000, are_shares=False)
    assert coverage(*bounds, 200) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("samples", [1, 4])
def test_paired_bootstrap_covers(samples):
    """The second set is better by 5 points on average, on the same problems."""
    random = np.random.default_rng(samples)
    chances = 0.9 * problems(random, (EXPERIMENTS, 250))
    a = random.binomial(samples, chances) / samples
    b = random.binomial(samples, chances + 0.05) / samples
    _, low, high = paired_bootstrap(a, b, resamples=1000)
    assert coverage(low, high, 0.05) == pytest.approx(0.95, abs=0.015)


def test_mcnemar_is_seldom_wrong():
    """Where neither set is better, at most 5 % of the experiments say that one is."""
    random = np.random.default_rng(0)
    only_a = random.binomial(60, 0.5, EXPERIMENTS)
    found = np.mean([mcnemar(count, 60 - count) < 0.05 for count in only_a])
    assert 0.02 < found < 0.05
