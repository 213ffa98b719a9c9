"""Rows that go from rank to rank, in threads that stand for processes: each arrives once, and as it was."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import World

from trl_grpo_ext.rollouts import exchange
from trl_grpo_ext.rollouts.exchange import Ranks, balance
from trl_grpo_ext.rollouts.rows import rows_on_host, select


@dataclass
class Made:
    rows: dict[str, torch.Tensor]
    steps: list[int]
    is_kept: list[bool]


def make_rows(rank, count, seed, num_steps=2):
    """Rows of a rank, padded to its own longest; a row's values say which it is."""
    numbers = torch.Generator().manual_seed(1000 * seed + rank)

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=numbers)

    prompt_lengths, lengths = whole(1, 7, count), whole(0, 9, count)
    prompt_columns, columns = int(prompt_lengths.max()) + 1, max(2, int(lengths.max()))
    prompt_mask = (torch.arange(prompt_columns) >= prompt_columns - prompt_lengths.unsqueeze(1)).long()
    mask = (torch.arange(columns) < lengths.unsqueeze(1)).long()
    names = 100 * rank + torch.arange(count)
    prompts = whole(0, 2, count).unsqueeze(1) * 10 + torch.arange(prompt_columns).flip(0) + 20
    return Made(
        {
            "prompt_ids": torch.where(prompt_mask.bool(), prompts, 3),
            "prompt_mask": prompt_mask,
            "completion_ids": torch.where(mask.bool(), names.unsqueeze(1), 3),
            "completion_mask": mask,
            "tool_mask": (mask * whole(0, 2, count, columns)).bool(),
            "advantages": torch.randn(count, columns, generator=numbers).bfloat16() * mask,
            "old_per_token_logps": torch.randn(count, columns, generator=numbers) * mask,
            "importance_sampling_ratio": names.double().unsqueeze(1),
            "names": names,
            "grid": names.view(-1, 1, 1).float().repeat(1, 2, 3),
            "num_items_in_batch": torch.tensor(17),
        },
        sorted(whole(0, num_steps, count).tolist()[:-1] + [num_steps - 1]),
        whole(0, 2, count).bool().tolist(),
    )


def contents(rows, index):
    """What a row is, without padding."""
    row = select(rows, slice(index, index + 1))
    length, prompt_length = int(row["completion_mask"].sum()), int(row["prompt_mask"].sum())
    found = {}
    for key, value in row.items():
        if key.startswith("prompt_"):
            value = value[:, value.size(1) - prompt_length :]
        elif value.shape == row["completion_ids"].shape:
            assert key == "completion_ids" or not value[:, length:].any(), key
            value = value[:, :length]
        found[key] = (str(value.dtype), tuple(value.shape), value.flatten().tolist())
    return found


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(2, 8), st.integers(0, 2**20), st.sets(st.integers(0, 3)))
def test_each_row_arrives_once_and_as_it_was(size, count, seed, cannot_share):
    world = World(size)
    made = [make_rows(rank, count, seed) for rank in range(size)]
    of_rank = {
        int(rows.rows["names"][index]): (contents(rows.rows, index), rows.steps[index])
        for rows in made
        for index in range(count)
        if rows.is_kept[index]
    }

    def deal(accelerator):
        rank, ranks = accelerator.process_index, Ranks(accelerator, pad_token_id=3)
        rows = made[rank].rows
        known = rows_on_host(rows["prompt_ids"], rows["prompt_mask"], rows["completion_mask"])
        return balance(
            rows,
            known,
            made[rank].steps,
            made[rank].is_kept,
            ranks,
            by_prompt=rank not in cannot_share,
            padded_tokens=rank,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "distributed", world)
        dealt = world.run(deal)
    seen = []
    for balanced in dealt:
        assert balanced.padded_tokens == size - 1  # the most of any
        assert balanced.by_prompt == cannot_share.isdisjoint(range(size))
        assert balanced.figures == dealt[0].figures._replace(
            sent_bytes=balanced.figures.sent_bytes, seconds=balanced.figures.seconds
        )
        for step, order in enumerate(balanced.orders):
            for index in order:
                name = int(balanced.rows["names"][index])
                assert contents(balanced.rows, index) == of_rank[name][0]
                assert of_rank[name][1] == step
                row, length = balanced.known[index], int(balanced.rows["completion_mask"][index].sum())
                assert (row.row.prompt_tokens, row.row.completion_tokens, row.used_columns) == (
                    int(balanced.rows["prompt_mask"][index].sum()),
                    length,
                    length,
                )
                seen.append(name)
        prompts = {}
        for index, row in enumerate(balanced.known):  # the same prompt, the same number, and no other
            ids = contents(balanced.rows, index)["prompt_ids"][2]
            assert prompts.setdefault(row.row.prompt, ids) == ids
    assert sorted(seen) == sorted(of_rank)
    moved = sum(seen_here >= count for balanced in dealt for order in balanced.orders for seen_here in order)
    assert moved == dealt[0].figures.num_moved
    assert len({tuple(balanced.rows["prompt_ids"].shape[1:]) for balanced in dealt}) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: {**rows, "more": rows["names"]},
        lambda rows: {**rows, "names": rows["names"].int()},
        lambda rows: {**rows, "grid": rows["grid"][:, :1]},
        lambda rows: {**rows, "advantages": rows["advantages"][:, 0]},
    ],
)
def test_rows_of_different_kinds_stay(change):
    world = World(2)

    def deal(accelerator):
        rank, ranks = accelerator.process_index, Ranks(accelerator, pad_token_id=3)
        made = make_rows(rank, 4, 0)
        rows = change(made.rows) if rank == 1 else made.rows
        known = rows_on_host(rows["prompt_ids"], rows["prompt_mask"], rows["completion_mask"])
        return balance(rows, known, made.steps, made.is_kept, ranks, by_prompt=True, padded_tokens=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "distributed", world)
        assert world.run(deal) == [None, None]
