"""Which rank computes which row: by hand, by properties, and what the plan is worth on many ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config, Qwen3MoeConfig

from trl_grpo_ext.rollouts.balance import (
    NOWHERE,
    WORK_OF_A_TOKEN,
    Cost,
    RowTable,
    ranks_of_rows,
    slowest_over_mean,
    work_of_a_pair,
    work_of_ranks,
)


def table_of(*rows, num_ranks):
    """Rows (rank, step, prompt, prompt's tokens, completion's tokens, is kept)."""
    assert {row[0] for row in rows} <= set(range(num_ranks))
    return RowTable(*np.array(rows, dtype=np.int64).reshape(-1, 6).T)


def tokens_by_hand(table, ranks, num_ranks, step):
    """Tokens that each rank computes: of each prompt once, all but the last, and of completions all."""
    tokens = []
    for rank in range(num_ranks):
        prompts, total = {}, 0
        for index in range(len(table)):
            if ranks[index] == rank and table.step[index] == step and table.completion_tokens[index]:
                prompts[int(table.prompt[index])] = int(table.prompt_tokens[index]) - 1
                total += int(table.completion_tokens[index])
        tokens.append(total + sum(prompts.values()))
    return tokens


PROMPT_TOKENS = (1, 4, 10, 50)
TABLES = st.integers(1, 5).flatmap(
    lambda num_ranks: st.tuples(
        st.just(num_ranks),
        st.lists(
            st.tuples(
                st.integers(0, num_ranks - 1), st.integers(0, 2), st.integers(0, 3), st.integers(0, 30), st.booleans()
            ).map(lambda row: (*row[:3], PROMPT_TOKENS[row[2]], *row[3:])),
            min_size=1,
            max_size=20,
        ),
    )
)


@settings(max_examples=100)
@given(TABLES, st.booleans(), st.sampled_from([0, 5000]))
def test_every_plan(case, by_prompt, work_of_a_pair):
    num_ranks, rows = case
    table, cost = table_of(*rows, num_ranks=num_ranks), Cost(by_prompt, work_of_a_pair, 50)
    ranks = ranks_of_rows(table, num_ranks, cost)
    is_kept = table.is_kept.astype(bool)
    assert (ranks[~is_kept] == NOWHERE).all()
    assert ((ranks[is_kept] >= 0) & (ranks[is_kept] < num_ranks)).all()
    without_tokens = is_kept & (table.completion_tokens == 0)
    assert (ranks[without_tokens] == table.rank[without_tokens]).all()
    if by_prompt:
        tokens = work_of_ranks(table, ranks, num_ranks, Cost(True)) / WORK_OF_A_TOKEN
        steps = sorted(set(table.step.tolist()))
        assert tokens.tolist() == [tokens_by_hand(table, ranks, num_ranks, step) for step in steps]
    # The one with most cannot give a row to the one with least, so that both have less and it is worth the prompt.
    work = work_of_ranks(table, ranks, num_ranks, cost)
    for place, step in enumerate(sorted(set(table.step.tolist()))):
        most, least = work[place].argmax(), work[place].argmin()
        for row in np.flatnonzero((ranks == most) & (table.step == step) & (table.completion_tokens > 0)):
            moved = ranks.copy()
            moved[row] = least
            after = work_of_ranks(table, moved, num_ranks, cost)[place]
            gain = work[place, most] - max(after[most], after[least])
            assert gain <= 0 or gain < 0.1 * (after.sum() - work[place].sum())


def test_plans_do_not_depend_on_who_makes_them():
    """Ranks number prompts in the same way, but nothing else may matter: the same table, the same plan."""
    numbers = np.random.default_rng(0)
    rows = [(rank, 0, prompt, 20, int(numbers.integers(1, 90)), 1) for rank in range(4) for prompt in (2 * rank, 9)]
    table = table_of(*rows, num_ranks=4)
    plans = [ranks_of_rows(table, 4, Cost(True, 123)).tolist() for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # a rank with two groups gives one to a rank without any, and keeps the other
        (
            [(0, 0, 7, 5, 10, 1)] * 2 + [(0, 0, 8, 5, 10, 1)] * 2 + [(1, 0, 9, 5, 10, 0)] * 4,
            [1, 1, 0, 0] + [NOWHERE] * 4,
        ),
        # nothing moves where that would make nobody faster
        ([(0, 0, 7, 5, 10, 1)] * 2 + [(1, 0, 8, 5, 10, 1)] * 2, [0, 0, 1, 1]),
        # of one group half of the rows go, with their prompt once more
        ([(0, 0, 7, 5, 10, 1)] * 4 + [(1, 0, 8, 5, 10, 0)] * 4, [1, 1, 0, 0] + [NOWHERE] * 4),
        # but not where that prompt is what takes the time
        ([(0, 0, 7, 500, 10, 1)] * 2 + [(1, 0, 8, 5, 10, 0)] * 2, [0, 0] + [NOWHERE] * 2),
        # a group that two ranks have is whole again: its prompt is computed once
        ([(0, 0, 7, 50, 10, 1), (1, 0, 7, 50, 10, 1), (0, 0, 8, 50, 10, 1), (1, 0, 8, 50, 10, 1)], None),
        # each step by itself
        ([(0, 0, 7, 5, 9, 1), (0, 0, 8, 5, 9, 1), (1, 1, 7, 5, 9, 1), (1, 1, 8, 5, 9, 1)], None),
    ],
)
def test_a_few_rows(rows, expected):
    table = table_of(*rows, num_ranks=2)
    ranks = ranks_of_rows(table, 2, Cost(True))
    if expected is not None:
        counts = [
            sorted(np.bincount(np.array(found)[np.array(found) >= 0], minlength=2)) for found in (ranks, expected)
        ]
        assert list(counts[0]) == list(counts[1])
        assert (ranks == NOWHERE).tolist() == [rank == NOWHERE for rank in expected]
    elif len(set(table.step.tolist())) == 1:
        assert all(len(set(ranks[table.prompt == prompt].tolist())) == 1 for prompt in (7, 8))
    else:
        assert all(sorted(ranks[table.step == step].tolist()) == [0, 1] for step in (0, 1))


def test_one_group_on_many_ranks():
    """A group of a thousand rows, which only moves in pieces; every rank gets some, and soon."""
    numbers = np.random.default_rng(0)
    rows = [(0, 0, 7, 100, int(length), 1) for length in numbers.integers(50, 400, 1024)]
    table = table_of(*rows, num_ranks=64)
    work = work_of_ranks(table, ranks_of_rows(table, 64, Cost(True)), 64, Cost(True))
    assert slowest_over_mean(work) < 1.1


def test_few_rows_move():
    """Of plans that are equally good, one in which ranks keep what they have."""
    rows = [(rank, 0, 2 * rank + half, 20, 100, 1) for rank in range(8) for half in (0, 1) for _ in range(4)]
    table = table_of(*rows, num_ranks=8)
    assert (ranks_of_rows(table, 8, Cost(True)) == table.rank).mean() >= 0.5


def test_long_rows_cost_more_than_their_tokens():
    """Three rows of 8,000 tokens among many of 200: who has two of them gets fewer tokens."""
    rows = [(0, 0, number, 1, 8000, 1) for number in range(3)]
    rows += [(1, 0, 3 + number, 1, 200, 1) for number in range(20) for _ in range(8)]
    table = table_of(*rows, num_ranks=2)
    shape = Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864
    )
    for pair, expected in ((0, pytest.approx(1, abs=0.02)), (work_of_a_pair(shape), pytest.approx(0.905, abs=0.02))):
        ranks = ranks_of_rows(table, 2, Cost(True, pair))
        has_two = int(ranks[:3].sum() >= 2)
        tokens = np.bincount(ranks, table.completion_tokens, 2)
        assert tokens[has_two] / tokens[1 - has_two] == expected


def test_work_of_a_pair():
    """By hand: operations of attention between two tokens, over those of a token with the weights."""
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
        vocab_size=10, head_dim=2,
    )  # fmt: skip
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 10
    assert work_of_a_pair(config) == round(WORK_OF_A_TOKEN * (3 * 4 * 8) / (2 * weights))
    many, few = (Qwen3MoeConfig(num_experts_per_tok=number) for number in (8, 1))
    assert 0 < work_of_a_pair(many) < work_of_a_pair(few)
    assert work_of_a_pair(object()) == 0


def test_slowest_over_mean():
    assert slowest_over_mean(np.array([[4, 2], [1, 3]])) == pytest.approx((4 + 3) / (3 + 2))
    assert slowest_over_mean(np.array([[0, 0]])) == 1
