"""Statistics of micro-batches against counting token by token, and what ends a pass."""

import math
import random

import pytest
import torch

from trl_grpo_ext.metrics import (
    FIELDS,
    LeftOut,
    SamplingStatistics,
    Statistics,
    micro_batch_statistics,
    nothing_seen,
    objective_statistics,
    sampling_statistics,
)
from trl_grpo_ext.objective import ClippedObjective
from trl_grpo_ext.passes import PassStatistics, can_shorten, can_stop, exceeds_target


ROWS, COLUMNS = 5, 6


def made_up(seed, on_tokens, dead_rows=(1,), empty_rows=(3,)):
    """A micro-batch, as lists: mask, log-ratios, where the clip binds, entropies, KL, which rows carry a gradient."""
    numbers = random.Random(seed)
    lengths = [0 if row in empty_rows else numbers.randint(1, COLUMNS) for row in range(ROWS)]
    width = COLUMNS if on_tokens else 1

    def table(draw, columns=COLUMNS):
        return [[draw() for _ in range(columns)] for _ in range(ROWS)]

    rows = {
        "mask": [[int(column < length) for column in range(COLUMNS)] for length in lengths],
        "log_ratio": table(lambda: numbers.gauss(0, 0.5)),
        "low": table(lambda: numbers.random() < 0.3, width),
        "high": table(lambda: numbers.random() < 0.3, width),
        "entropies": table(numbers.random),
        "kl": table(numbers.random),
        "live": [row not in (*dead_rows, *empty_rows) for row in range(ROWS)],
    }
    for row in dead_rows:  # without an advantage no clip binds
        rows["low"][row], rows["high"][row] = [False] * width, [False] * width
    return rows


def statistics_of(rows, left_out=None, is_placeholder=False, gamma=None):
    tensors = {name: torch.tensor(values) for name, values in rows.items()}
    return micro_batch_statistics(
        tensors["mask"],
        tensors["log_ratio"],
        tensors["low"],
        tensors["high"],
        tensors["live"],
        tensors["entropies"],
        tensors["kl"],
        left_out,
        is_placeholder,
        gamma,
    )


def counted(rows, left_out=None):
    """The same by loops."""
    found = dict.fromkeys(FIELDS, 0.0)
    found["live_ratio_max"] = -math.inf
    shares = {"low": [], "high": []}
    for row in range(ROWS):
        on_tokens = len(rows["low"][row]) > 1
        tokens = [column for column in range(COLUMNS) if rows["mask"][row][column]]
        for column in tokens:
            place = column if on_tokens else 0
            low, high = rows["low"][row][place], rows["high"][row][place]
            log_ratio = rows["log_ratio"][row][column]
            found["tokens"] += 1
            found["entropy"] += rows["entropies"][row][column]
            found["kl_to_reference"] += rows["kl"][row][column]
            if rows["live"][row]:
                found["live_tokens"] += 1
                found["live_kl_to_old"] += math.exp(log_ratio) - log_ratio - 1
                found["live_low_clipped"] += low
                found["live_high_clipped"] += high
                found["live_region_clipped"] += low or high
                found["live_ratio_max"] = max(found["live_ratio_max"], math.exp(log_ratio))
        places = tokens if on_tokens else [0]
        for place in places:
            low, high = rows["low"][row][place], rows["high"][row][place]
            found["units"] += 1
            found["low_clipped_units"] += low
            found["high_clipped_units"] += high
            found["region_clipped_units"] += low or high
        if places:
            for name in shares:
                shares[name].append(sum(rows[name][row][place] for place in places) / len(places))
    if left_out is not None:
        found["units"] += left_out.tokens if on_tokens else left_out.rows
        if left_out.rows_with_tokens if on_tokens else left_out.rows:
            shares["low"].append(0.0)
            shares["high"].append(0.0)
    found["low_share_min"], found["high_share_max"] = min(shares["low"]), max(shares["high"])
    if found["live_ratio_max"] == -math.inf:
        found["live_ratio_max"] = 0.0
    return list(found.values())


@pytest.mark.parametrize("on_tokens", [True, False])
@pytest.mark.parametrize("left_out", [None, LeftOut(0, 0, 0), LeftOut(3, 2, 9), LeftOut(1, 0, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_statistics_of_a_micro_batch(on_tokens, left_out, seed):
    rows = made_up(seed, on_tokens)
    assert statistics_of(rows, left_out).tolist() == pytest.approx(counted(rows, left_out), rel=1e-5)


def test_clipped_shares_of_rows_that_are_all_clipped():
    """The smallest share is not 0, and one row that was left out makes it 0."""
    rows = made_up(0, True, dead_rows=(), empty_rows=())
    rows["low"] = [[True] * COLUMNS for _ in range(ROWS)]
    smallest = FIELDS.index("low_share_min")
    assert statistics_of(rows)[smallest] == 1.0
    assert statistics_of(rows, LeftOut(1, 1, 4))[smallest] == 0.0
    assert statistics_of(rows, LeftOut(1, 0, 0))[smallest] == 1.0


@pytest.mark.parametrize("on_tokens", [True, False])
def test_a_placeholder_is_no_row(on_tokens):
    rows = made_up(0, on_tokens, dead_rows=(), empty_rows=range(ROWS))
    metrics = Statistics(statistics_of(rows, is_placeholder=True).unsqueeze(0))
    assert metrics.of_trl("clipped", with_reference=True) == metrics.of_iteration("clipped") == {}
    left_out = Statistics(statistics_of(rows, LeftOut(2, 2, 5), is_placeholder=True).unsqueeze(0))
    assert left_out.total("units") == (5 if on_tokens else 2)
    assert left_out.of_trl("clipped", with_reference=True) == {
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.0,
        "clip_ratio/region_mean": 0.0,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_max": 0.0,
    }


def test_metrics_are_weighed_by_tokens():
    """Two micro-batches of different length are as one that holds them both."""
    batches = [made_up(seed, True) for seed in (1, 2)]
    found = Statistics(torch.stack([statistics_of(rows) for rows in batches]))
    both = [sum(values) for values in zip(*(counted(rows) for rows in batches), strict=True)]
    sums = dict(zip(FIELDS, both, strict=True))
    of_trl, of_pass = found.of_trl("clipped", with_reference=True), found.of_iteration("clipped")
    assert of_trl["entropy"] == pytest.approx(sums["entropy"] / sums["tokens"], rel=1e-5)
    assert of_trl["kl"] == pytest.approx(sums["kl_to_reference"] / sums["tokens"], rel=1e-5)
    for side in ("low", "high", "region"):
        share = sums[f"{side}_clipped_units"] / sums["units"]
        assert of_trl[f"clip_ratio/{side}_mean"] == pytest.approx(share, rel=1e-5)
    assert of_trl["clip_ratio/low_min"] == min(counted(rows)[FIELDS.index("low_share_min")] for rows in batches)
    assert of_trl["clip_ratio/high_max"] == pytest.approx(
        max(counted(rows)[FIELDS.index("high_share_max")] for rows in batches)
    )
    assert of_pass["approx_kl"] == pytest.approx(sums["live_kl_to_old"] / sums["live_tokens"], rel=1e-4)
    for name, field in (("clip_ratio", "region"), ("clip_ratio_low", "low"), ("clip_ratio_high", "high")):
        assert of_pass[name] == pytest.approx(sums[f"live_{field}_clipped"] / sums["live_tokens"], rel=1e-5)
    assert of_pass["ratio_max"] == pytest.approx(
        max(counted(rows)[FIELDS.index("live_ratio_max")] for rows in batches), rel=1e-5
    )
    assert "kl" not in found.of_trl("clipped", with_reference=False)


def test_each_surrogate_has_its_metrics():
    """TRL's names: of what is clipped on both sides, above, or not at all; and VESPO's weights, over rows."""
    rows, left_out = made_up(1, False), LeftOut(3, 2, 9)
    gamma = torch.linspace(0.1, 0.5, ROWS).unsqueeze(1)
    statistics = Statistics(statistics_of(rows, left_out, gamma=gamma).unsqueeze(0))
    clipped, cispo, sapo, vespo = (
        statistics.of_trl(surrogate, with_reference=False) for surrogate in ("clipped", "cispo", "sapo", "vespo")
    )
    assert sapo.keys() == {"entropy"}
    assert clipped.keys() - sapo.keys() == {f"clip_ratio/{name}" for name in MEANS_AND_ENDS}
    assert cispo.keys() - sapo.keys() == {"cispo_clip_ratio"}
    assert cispo["cispo_clip_ratio"] == clipped["clip_ratio/high_mean"] > 0
    assert vespo.keys() - sapo.keys() == {"vespo/phi_seq_mean"}
    assert vespo["vespo/phi_seq_mean"] == pytest.approx(0.3)  # of rows that were left out none is known
    gamma_of_tokens = torch.rand(ROWS, COLUMNS)
    of_tokens = Statistics(statistics_of(rows, left_out, gamma=gamma_of_tokens).unsqueeze(0))
    of_tokens_mean = of_tokens.of_trl("vespo", with_reference=False)
    expected = gamma_of_tokens[torch.tensor(rows["mask"]).bool()].mean().item()
    assert of_tokens_mean["vespo/phi_seq_mean"] == pytest.approx(expected, rel=1e-5)
    for surrogate, is_clipped in (("clipped", True), ("cispo", True), ("sapo", False), ("vespo", False)):
        assert ("clip_ratio" in statistics.of_iteration(surrogate)) == is_clipped
        assert "approx_kl" in statistics.of_iteration(surrogate)


MEANS_AND_ENDS = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")


# The sampler


def sampled(seed, is_missing=lambda place: False, on_rows=False):
    """Log-probabilities, mask and weights, as lists."""
    numbers = random.Random(seed)
    mask = [[int(column < length) for column in range(COLUMNS)] for length in (6, 3, 1, 0, 4)]
    old, new = ([[-numbers.random() for _ in range(COLUMNS)] for _ in range(ROWS)] for _ in range(2))
    for row in range(ROWS):
        for column in range(COLUMNS):
            if is_missing((row, column)):
                new[row][column] = math.nan
    return old, new, mask, [[numbers.random() for _ in range(1 if on_rows else COLUMNS)] for _ in range(ROWS)]


@pytest.mark.parametrize("on_rows", [False, True])
def test_statistics_of_a_sampler(on_rows):
    """TRL's: of the tokens that count and have a log-probability; weights of all tokens that count, or of all rows."""
    batches = [sampled(seed, lambda place: sum(place) % 4 == 3, on_rows) for seed in range(2)]
    statistics = SamplingStatistics()
    for batch in batches:
        statistics.observe(sampling_statistics(*map(torch.tensor, batch)))
    differences, weights = [], []
    for old, new, mask, weight in batches:
        for row in range(ROWS):
            tokens = [column for column in range(COLUMNS) if mask[row][column]]
            found = [abs(old[row][column] - new[row][column]) for column in tokens]
            differences += [value for value in found if not math.isnan(value)]
            weights += weight[row] if on_rows else [weight[row][column] for column in tokens]
    assert statistics.report(lambda tensor: tensor) == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": sum(differences) / len(differences),
            "sampling/sampling_logp_difference/max": max(differences),
            "sampling/importance_sampling_ratio/min": min(weights),
            "sampling/importance_sampling_ratio/mean": sum(weights) / len(weights),
            "sampling/importance_sampling_ratio/max": max(weights),
        },
        rel=1e-5,
    )
    assert statistics.report(lambda tensor: tensor) == {}


def test_processes_count_alike_and_empty_ones_do_not():
    """As TRL has it: the mean of the processes' means."""

    def of(*batches):
        statistics, gathered = SamplingStatistics(), []
        for batch in batches:
            statistics.observe(sampling_statistics(*map(torch.tensor, batch)))
        metrics = statistics.report(lambda tensor: gathered.append(tensor) or tensor)
        return metrics, gathered[0]

    (alone, first), (of_two, second) = of(sampled(1)), of(sampled(2), sampled(3))
    old, new, _, weights = sampled(4)
    nothing, empty = of((old, new, [[0] * COLUMNS] * ROWS, weights))
    assert nothing == {}
    statistics = SamplingStatistics()
    statistics.observe(sampling_statistics(*map(torch.tensor, sampled(1))))
    together = statistics.report(lambda tensor: torch.cat([tensor, second, empty]))
    assert torch.equal(first, of(sampled(1))[1])
    for name, combine in (("mean", lambda a, b: (a + b) / 2), ("min", min), ("max", max)):
        for key in (key for key in together if key.endswith(f"/{name}")):
            assert together[key] == pytest.approx(combine(alone[key], of_two[key]), rel=1e-6)
    placeholder, gathered = SamplingStatistics(), []
    rows = map(torch.tensor, ([[-1.0]], [[-2.0]], [[0]], [[1.0]]))
    placeholder.observe(sampling_statistics(*rows, is_placeholder=True))
    assert placeholder.report(lambda tensor: gathered.append(tensor) or tensor) == {}
    assert len(gathered) == 1  # other processes have rows, and all take part in the call
    missing, _ = of(sampled(5, lambda place: True))
    assert missing.keys() == {f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")}


# Passes


def twice(tensor):
    """As if another process had seen the same."""
    return torch.cat([tensor, tensor])


def test_passes_report_for_themselves():
    passes = PassStatistics()
    batches = [made_up(seed, True) for seed in range(3)]
    for rows, iteration, replaces in zip(batches, (1, 2, 2), (True, True, False), strict=True):
        passes.observe(statistics_of(rows), iteration, replaces_trls=replaces)
    metrics = passes.report(twice, "clipped", with_reference=True)
    alone = Statistics(statistics_of(batches[0]).unsqueeze(0))
    second = Statistics(torch.stack([statistics_of(rows) for rows in batches[1:]]))
    of_trl = Statistics(torch.stack([statistics_of(rows) for rows in batches[:2]])).of_trl("clipped", True)
    expected = {f"iteration/1/{name}": value for name, value in alone.of_iteration("clipped").items()}
    expected |= {f"iteration/2/{name}": value for name, value in second.of_iteration("clipped").items()}
    assert metrics == pytest.approx({**of_trl, **expected})
    assert passes.report(twice, "clipped", with_reference=True) == {}
    sums = sum(statistics_of(rows)[:2] for rows in batches)
    assert passes.end_pass().tolist() == pytest.approx(sums.tolist())
    assert passes.end_pass() is None


def test_a_loss_of_others_has_no_metrics_of_trl():
    passes = PassStatistics()
    passes.observe(statistics_of(made_up(0, True)), 1, replaces_trls=False)
    assert all(name.startswith("iteration/1/") for name in passes.report(twice, "clipped", with_reference=True))


@pytest.mark.parametrize(
    ("kl", "tokens", "target_kl", "stops"),
    [(1.01, 10, 0.1, True), (0.99, 10, 0.1, False), (0.2, 1, 0.1, True), (0.0, 0, 0.1, False), (1.0, 10, 0.1, False)],
)
def test_the_target_is_for_a_token(kl, tokens, target_kl, stops):
    assert exceeds_target(kl, tokens, target_kl) == stops


@pytest.mark.parametrize(
    ("passes", "micro_batches", "accumulation", "possible"),
    [(2, 2, 4, False), (2, 2, 8, False), (2, 2, 2, True), (4, 1, 2, True), (2, 3, 4, True), (4, 2, 1, True)],
)
def test_passes_in_one_optimizer_step_cannot_stop(passes, micro_batches, accumulation, possible):
    assert can_stop(passes, micro_batches, accumulation) == possible


@pytest.mark.parametrize(
    ("passes", "micro_batches", "accumulation", "possible"),
    [
        *((2, 1, 1, False), (2, 2, 2, False), (2, 4, 4, False), (3, 1, 1, True), (2, 2, 1, True), (2, 3, 2, True)),
        (2, 3, 4, True),  # passes and optimizer steps do not line up
    ],
)
def test_a_pass_is_left_to_be_given_up(passes, micro_batches, accumulation, possible):
    assert can_shorten(passes, micro_batches, accumulation) == possible


def test_statistics_of_an_objective():
    """All that it knows is handed on: on the sequence level a placeholder would count as a row."""
    rows = made_up(0, True)
    logps, old, reference, mask = (torch.tensor(rows[name]) for name in ("log_ratio", "entropies", "kl", "mask"))
    objective = ClippedObjective(0.2, 0.2, beta=0.1, level="sequence")
    output = objective(logps, old, torch.tensor([1.0, 0.0, -1.0, 2.0, 1.0]), mask, reference)
    live, entropies, left_out = torch.tensor(rows["live"]), old, LeftOut(3, 2, 9)
    for is_placeholder in (False, True):
        expected = micro_batch_statistics(
            mask,
            logps - old,
            output.is_low_clipped,
            output.is_high_clipped,
            live,
            entropies,
            output.per_token_kl,
            left_out,
            is_placeholder,
        )
        found = objective_statistics(output, logps - old, live, entropies, left_out, is_placeholder)
        assert found.equal(expected)
        assert found[FIELDS.index("units")] == (3 if is_placeholder else 8)


def test_nothing_seen_changes_nothing():
    seen = statistics_of(made_up(0, True))
    nothing = dict(zip(FIELDS, nothing_seen(seen.device).tolist(), strict=True))
    ends = {"live_ratio_max": -math.inf, "low_share_min": math.inf, "high_share_max": -math.inf}
    assert nothing == {**dict.fromkeys(FIELDS, 0.0), **ends}
    both = Statistics(torch.stack([seen, nothing_seen(seen.device)]))
    alone = Statistics(seen.unsqueeze(0))
    assert both.of_trl("clipped", True) == alone.of_trl("clipped", True)
    assert both.of_iteration("clipped") == alone.of_iteration("clipped")
