"""The rows of a generation batch: where they go, and that a checkpoint keeps them."""

import math
import signal
from dataclasses import fields

import pytest
import torch
from canned import assert_same_weights, canned_config, canned_prompts, schedule_options, train_canned
from hypothesis import given
from hypothesis import strategies as st
from launch import run_canned
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.metrics import LeftOut
from trl_grpo_ext.rollouts import FOLDER, RolloutBuffer, RolloutError, carries_gradient, logps_of_completions
from trl_grpo_ext.rollouts.rows import on_host
from trl_grpo_ext.shared_prefix.layout import packed_layout
from trl_grpo_ext.trainer import GRPOExtTrainer


def micro_batches(advantages, lengths=None, columns=5, rows=2):
    """Rows that know their number: row i of the batch has completion ids i."""
    batches = []
    for start in range(0, len(advantages), rows):
        numbers = torch.arange(start, start + rows).unsqueeze(1)
        length = torch.tensor([columns if lengths is None else lengths[n] for n in range(start, start + rows)])
        batches.append(
            {
                "prompt_ids": numbers.repeat(1, 3),
                "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
                "completion_ids": numbers.repeat(1, columns),
                "completion_mask": (torch.arange(columns) < length.unsqueeze(1)).long(),
                "advantages": torch.tensor(advantages[start : start + rows]),
                "num_items_in_batch": torch.tensor(17),
            }
        )
    return batches


def rows_of(buffer):
    return [micro_batch["completion_ids"][:, 0].tolist() for micro_batch in buffer]


@pytest.mark.parametrize(
    ("advantages", "window", "expected"),
    [
        ([1.0, 0, 0, -1, 2, 1, 0, 1], 4, [[0, 3], [4], [5], [7]]),
        ([1.0, 0, 0, -1, 2, 1, 0, 1], 2, [[0], [3], [4, 5], [7]]),  # a row stays in its optimizer step
        ([1.0, 1, 1, 1, 1, 1, 1, 1], 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ([0.0, 0, 0, 5], 2, [[3], [0]]),
        ([0.0, 0, 0, 0], 1, [[0], [2]]),
    ],
)
def test_rows_without_a_gradient(advantages, window, expected):
    buffer = RolloutBuffer(micro_batches(advantages))
    buffer.arrange(window, skip_zero_advantage=True, by_prompt=False)
    assert rows_of(buffer) == expected
    assert buffer.num_skipped == sum(advantage == 0 for advantage in advantages)
    live = {row for row, advantage in enumerate(advantages) if advantage}
    for micro_batch in buffer:
        assert micro_batch["num_items_in_batch"] == 17
        row = micro_batch["completion_ids"][0, 0].item()
        if row not in live:  # a placeholder
            assert micro_batch["completion_ids"].shape == micro_batch["prompt_ids"].shape == (1, 1)
            assert not micro_batch["completion_mask"].any()
            assert micro_batch["prompt_mask"].all()
        assert not carries_gradient(micro_batch).all() or row in live


@pytest.mark.parametrize("on_tokens", [True, False])
def test_rows_without_weight(tmp_path, on_tokens):
    """Left out of an optimizer step as soon as weights of all its micro-batches are known, and counted apart."""
    buffer = RolloutBuffer(micro_batches([1.0, 0, 1, 1, 1, 1, 1, 1], lengths=[5, 5, 3, 5, 5, 5, 5, 5]))
    buffer.arrange(2, skip_zero_advantage=True, by_prompt=False, skip_zero_weight=True)
    assert rows_of(buffer) == [[0, 2], [3], [4, 5], [6, 7]]
    weights = {0: 0.0, 2: 0.0, 3: 2.0, 4: 0.0, 5: 0.0, 6: 1.0, 7: 1.0}

    def weigh(index):
        rows = buffer[index]["completion_ids"][:, 0].tolist()
        of_rows = torch.tensor([[weights[row]] for row in rows])
        if on_tokens:
            of_rows = of_rows.repeat(1, 5)
            if 2 in rows:
                of_rows[rows.index(2), 3:] = 1.0  # behind its end, where nothing counts
        buffer.set_weights(index, of_rows)

    def left_out():
        buffer.leave_out_rows_without_weight(2, by_prompt=False)
        return buffer.num_without_weight

    assert left_out() == 0  # nothing is known yet
    for index in (0, 2, 3):
        weigh(index)
    assert left_out() == 2
    assert rows_of(buffer) == [[0, 2], [3], [6], [7]]
    weigh(1)
    assert left_out() == 4
    assert rows_of(buffer) == [[3], [0], [6], [7]]  # a placeholder
    assert [buffer.is_placeholder(index) for index in range(4)] == [False, True, False, False]
    assert left_out() == 4
    assert buffer.left_out(0) == LeftOut(1, 1, 5, 2)
    assert buffer.left_out(2) == LeftOut(0, 0, 0, 2)
    assert buffer.num_skipped == 1
    buffer.save(tmp_path, 0, 1, {})
    loaded, _ = RolloutBuffer.load(tmp_path, 0, 1)
    assert (loaded.num_skipped, loaded.num_without_weight) == (1, 4)
    assert loaded.skips_rows_without_weight


def test_weights_that_come_with_the_rows():
    """As where TRL has taken the forward: rows without weight are left out at once, if that is what the loss wants."""
    batches = micro_batches([1.0, 0, 1, 1])
    for batch, weights in zip(batches, ([[0.0], [0.0]], [[1.0], [0.5]]), strict=True):
        batch["importance_sampling_ratio"] = torch.tensor(weights)
    for skip_zero_weight, expected in ((True, [[2], [3]]), (False, [[0, 2], [3]])):
        buffer = RolloutBuffer(batches)
        buffer.arrange(2, skip_zero_advantage=True, by_prompt=False, skip_zero_weight=skip_zero_weight)
        assert rows_of(buffer) == expected
        assert buffer.left_out(0) == LeftOut(1, 1, 5, int(skip_zero_weight))


def prompts_and_lengths(rows, per_batch, columns=10, prompt_columns=10):
    """Micro-batches of rows (prompt's number, its length, the completion's length); completion ids are row numbers."""
    numbers = torch.arange(len(rows)).unsqueeze(1)
    prompt, length, completion = (torch.tensor(column).unsqueeze(1) for column in zip(*rows, strict=True))
    whole = {
        "prompt_ids": prompt.repeat(1, prompt_columns),
        "prompt_mask": (torch.arange(prompt_columns) >= prompt_columns - length).long(),
        "completion_ids": numbers.repeat(1, columns),
        "completion_mask": (torch.arange(columns) < completion).long(),
        "advantages": torch.ones(len(rows)),
    }
    return [{key: value[i : i + per_batch] for key, value in whole.items()} for i in range(0, len(rows), per_batch)]


@pytest.mark.parametrize(
    ("rows", "per_batch", "window", "expected"),
    [
        pytest.param(  # two prompts that TRL has shuffled
            [(0, 5, 4), (1, 5, 3), (1, 5, 3), (0, 5, 4)], 2, 2, [[0, 3], [1, 2]], id="groups come together"
        ),
        pytest.param(
            [(0, 5, 4), (1, 5, 3), (1, 5, 3), (0, 5, 4)], 2, 1, [[0, 1], [2, 3]], id="not across optimizer steps"
        ),
        pytest.param(  # 6 + 9 = 15 tokens, 14, 10: the last ones go to the lightest
            [(0, 6, 9), (1, 5, 9), (2, 6, 4), (3, 4, 1)], 2, 2, [[0, 3], [1, 2]], id="balanced by tokens"
        ),
        pytest.param(  # 2 + 4 x 10 tokens: halves are worth the second prompt
            [(0, 2, 10)] * 4, 2, 2, [[0, 1], [2, 3]], id="a group is halved"
        ),
        pytest.param(  # 10 + 4 x 1 tokens: they are not, a micro-batch stays empty
            [(0, 10, 1)] * 4, 2, 2, [[0, 1, 2, 3], [0]], id="a long prompt is computed once"
        ),
        pytest.param(  # more than the 2 x 20 tokens of a padded micro-batch
            [(0, 10, 10)] * 4, 2, 2, [[0, 1], [2, 3]], id="no more tokens than with padding"
        ),
        pytest.param(  # a row each is all there is to do
            [(0, 10, 10), (1, 10, 10), (2, 10, 10)], 1, 3, [[0], [1], [2]], id="full rows"
        ),
    ],
)
def test_rows_by_prompt(rows, per_batch, window, expected):
    buffer = RolloutBuffer(prompts_and_lengths(rows, per_batch))
    buffer.arrange(window, skip_zero_advantage=False, by_prompt=True)
    assert [sorted(share) for share in rows_of(buffer)] == expected
    assert buffer.num_skipped == 0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10)), min_size=12, max_size=12),
    st.sampled_from([1, 2, 3, 4, 6]),
)
def test_rows_by_prompt_lose_nothing(rows, per_batch):
    rows = [(prompt, (3, 10, 1, 7)[prompt], completion) for prompt, completion in rows]
    buffer = RolloutBuffer(prompts_and_lengths(rows, per_batch))
    before = torch.cat([batch["completion_mask"].sum(1) for batch in buffer])
    buffer.arrange(len(buffer), skip_zero_advantage=False, by_prompt=True)
    found = {}
    for batch in buffer:
        tokens = int(batch["completion_mask"].sum())
        has_tokens = batch["completion_mask"].any(dim=1)
        for prompt in set(batch["prompt_ids"][has_tokens, -1].tolist()):
            tokens += int(batch["prompt_mask"][batch["prompt_ids"][:, -1] == prompt][0].sum()) - 1
        assert tokens <= math.prod(buffer.padded_shape) == 20 * per_batch
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            if batch["completion_ids"].shape != (1, 1):
                found[int(ids[0])] = int(mask.sum())
    assert found == dict(enumerate(before.tolist()))


def test_few_micro_batches():
    """Of rows that are brought together by prompt, and of padded ones, with the rows' own widths."""
    rows = [(0, 5, 4), (1, 5, 3), (1, 5, 3), (0, 5, 4), (2, 9, 2), (3, 9, 10)]
    buffer = RolloutBuffer(prompts_and_lengths(rows, 2))
    buffer.arrange(3, skip_zero_advantage=False, by_prompt=True, most_tokens=22)
    # prompts without their last token: 4 + 8, 4 + 6, 8 + 2 and 8 + 10 tokens
    assert sorted(sorted(share) for share in rows_of(buffer)) == [[0, 3], [1, 2, 4], [5]]
    buffer = RolloutBuffer(prompts_and_lengths(rows, 2))
    buffer.arrange(3, skip_zero_advantage=False, by_prompt=True, most_tokens=50)
    assert [buffer.is_placeholder(index) for index in range(3)] == [False, True, True]
    assert [buffer.num_tokens(index, by_prompt=True) for index in range(3)] == [50, 1, 1]
    # 10 columns of prompts, and 10, 4, 4, 3, 3 and 2 of completions
    for most_tokens, expected in ((56, [[5, 0], [3, 1, 2, 4]]), (55, [[5], [0, 3], [1, 2, 4]])):
        buffer = RolloutBuffer(prompts_and_lengths(rows, 2))
        buffer.arrange(3, skip_zero_advantage=False, by_prompt=False, most_tokens=most_tokens)
        assert rows_of(buffer)[: len(expected)] == expected
        fullest = max(buffer.num_tokens(index, by_prompt=False) for index in range(3))
        assert (fullest, buffer.is_placeholder(2)) == ((56, True) if most_tokens == 56 else (39, False))


def test_where_few_micro_batches_cannot_be_had():
    """Rows are dealt out as if no number had been given."""
    rows = [(0, 5, 4), (1, 5, 3), (1, 5, 3), (0, 5, 4)]
    for by_prompt, expected in ((True, [[0, 3], [1, 2]]), (False, [[0, 1], [2, 3]])):
        buffer = RolloutBuffer(prompts_and_lengths(rows, 2))
        buffer.arrange(2, skip_zero_advantage=False, by_prompt=by_prompt, most_tokens=8)
        assert rows_of(buffer) == expected


def test_few_micro_batches_whenever_rows_move():
    buffer = RolloutBuffer(micro_batches([1.0, 0, 1, 1, 1, 1, 1, 1]))
    most = {"by_prompt": True, "most_tokens": 28}  # four rows of two prompt tokens and five of the completion
    buffer.arrange(4, skip_zero_advantage=True, **most)
    assert [len(share) for share in rows_of(buffer)[:2]] == [4, 3]
    assert [buffer.is_placeholder(index) for index in range(4)] == [False, False, True, True]
    buffer.shuffle(4, **most)
    assert [buffer.is_placeholder(index) for index in range(4)] == [False, False, True, True]
    for index in range(2):
        weights = (buffer[index]["completion_ids"][:, :1] < 4).float()
        buffer.set_weights(index, weights)
    buffer.leave_out_rows_without_weight(4, **most)
    assert sorted(rows_of(buffer)[0]) == [0, 2, 3]
    assert [buffer.is_placeholder(index) for index in range(4)] == [False, True, True, True]


# Layouts


def check_layouts(buffer):
    """What is kept is what would be made of the micro-batch."""
    for index in range(len(buffer)):
        (ids, mask, width), others = buffer.forward_inputs(index)
        trimmed = buffer.trimmed(index)
        assert ids.equal(torch.cat([trimmed["prompt_ids"], trimmed["completion_ids"]], dim=1))
        assert mask.equal(torch.cat([trimmed["prompt_mask"], trimmed["completion_mask"]], dim=1))
        assert (width, others) == (trimmed["completion_ids"].size(1), {})
        kept, made = buffer.layout_of(ids), packed_layout(ids, mask, width)
        assert buffer.layout_of(ids) is kept
        assert buffer.num_tokens(index, by_prompt=True) == made.num_tokens
        for item in fields(made):
            mine, anew = getattr(kept, item.name), getattr(made, item.name)
            assert mine.equal(anew) if isinstance(anew, torch.Tensor) else mine == anew, item.name
        assert buffer.layout_of(ids.clone()) is None  # who changes tokens gets none


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10)), min_size=8, max_size=8),
    st.sampled_from([None, 1, 30, 60]),
)
def test_layouts_follow_the_rows(rows, most_tokens):
    rows = [(prompt, (3, 10, 1, 7)[prompt], completion) for prompt, completion in rows]
    check_layouts(RolloutBuffer(prompts_and_lengths(rows, 2)))  # where TRL has put them
    for by_prompt in (True, False):
        buffer = RolloutBuffer(prompts_and_lengths(rows, 2))
        buffer.arrange(2, skip_zero_advantage=True, by_prompt=by_prompt, most_tokens=most_tokens)
        check_layouts(buffer)
        before = buffer.forward_inputs(0)[0][0]
        buffer.shuffle(2, by_prompt=by_prompt, most_tokens=most_tokens)
        assert buffer.layout_of(before) is None or buffer.forward_inputs(0)[0][0] is before
        check_layouts(buffer)


def test_layouts_of_a_checkpoint(tmp_path):
    buffer = RolloutBuffer(prompts_and_lengths([(0, 5, 4), (1, 1, 3), (1, 1, 3), (0, 5, 4)], 1))
    buffer.arrange(2, skip_zero_advantage=False, by_prompt=True, most_tokens=40)
    buffer.save(tmp_path, 0, 1, {})
    loaded, _ = RolloutBuffer.load(tmp_path, 0, 1)
    assert [loaded.is_placeholder(index) for index in range(4)] == [False, True, False, True]
    check_layouts(loaded)


def test_rows_that_cannot_be_packed_have_no_layout():
    batches = prompts_and_lengths([(0, 5, 4)] * 4, 2)
    batches[0]["completion_mask"][1, 1] = 0
    buffer = RolloutBuffer(batches)
    buffer.arrange(2, skip_zero_advantage=False, by_prompt=True, most_tokens=100)
    ids = buffer.forward_inputs(0)[0][0]
    assert buffer.layout_of(ids) is None
    assert buffer.trimmed(0)["completion_ids"].shape == (4, 4)
    assert buffer.num_tokens(0, by_prompt=True) == 4 * (10 + 4)


def test_the_host_asks_the_device_once(monkeypatch):
    """For all rows, whatever is then made of them: an optimizer step or a pass costs no other copy."""
    copies = []

    def copy(tensors):
        copies.append(sum(tensor.numel() for tensor in tensors))
        return on_host(tensors)

    monkeypatch.setattr("trl_grpo_ext.rollouts.buffer.on_host", copy)
    for arranges in (True, False):
        copies.clear()
        buffer = RolloutBuffer(micro_batches([1.0, 0, 1, 1, 0, 0, 0, 1]))
        if arranges:
            buffer.arrange(2, skip_zero_advantage=True, by_prompt=True, most_tokens=30)
        for _ in range(2):
            for index in range(len(buffer)):
                assert buffer.layout_of(buffer.forward_inputs(index)[0][0]) is not None
                buffer.num_tokens(index, by_prompt=True)
            if arranges:
                buffer.shuffle(2, by_prompt=True)
        # ids and mask of 3 prompt tokens, the mask of 5 others, and three facts where rows are left out
        assert copies == [8 * (3 + 3 + 5 + 3 * arranges)]


def test_rows_without_a_token_have_no_gradient():
    (batch,) = micro_batches([1.0, 1.0], lengths=[3, 0])
    assert carries_gradient(batch).tolist() == [True, False]
    batch["tool_mask"] = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    assert carries_gradient(batch).tolist() == [False, False]
    batch["advantages"] = torch.tensor([[0.0, 0, 0, 1, 1], [1.0, 1, 1, 1, 1]])  # one for each token
    batch["tool_mask"] = torch.ones(2, 5)
    assert carries_gradient(batch).tolist() == [False, False]


def test_trimming_and_old_logps():
    buffer = RolloutBuffer(micro_batches([1.0, 1, 1, 1], lengths=[3, 1, 5, 5]))
    assert buffer.trimmed(0)["completion_ids"].shape == (2, 3)
    assert buffer.trimmed(0)["prompt_ids"].shape == (2, 3)
    assert buffer.trimmed(1)["completion_ids"].shape == (2, 5)
    assert buffer.needs_old_logps(0)
    buffer.set_old_logps(0, torch.full((2, 3), -2.0))
    assert not buffer.needs_old_logps(0)
    assert buffer[0]["old_per_token_logps"].tolist() == [[-2.0, -2.0, -2.0, 0.0, 0.0]] * 2
    assert buffer.trimmed(0)["old_per_token_logps"].shape == (2, 3)


def test_trimming_where_prompts_are_as_wide():
    """Only completions are trimmed, and one column is left of them."""
    (batch,) = micro_batches([1.0, 1], lengths=[0, 0], columns=3)
    trimmed = RolloutBuffer([batch]).trimmed(0)
    assert trimmed["completion_ids"].shape == (2, 1)
    assert trimmed["prompt_ids"].shape == trimmed["prompt_mask"].shape == (2, 3)


def test_old_logps_keep_their_precision():
    buffer = RolloutBuffer(micro_batches([1.0, 1]))
    buffer.set_old_logps(0, torch.full((2, 5), -0.5, dtype=torch.float64))
    assert buffer[0]["old_per_token_logps"].dtype == torch.float64
    assert buffer[0]["old_per_token_logps"].unique().tolist() == [-0.5]


def test_rows_stay_while_old_logps_are_known_for_some_only():
    buffer = RolloutBuffer(micro_batches([1.0] * 8))
    before = rows_of(buffer)
    buffer.set_old_logps(0, torch.zeros(2, 5))
    torch.manual_seed(0)
    buffer.shuffle(1, by_prompt=False)
    assert rows_of(buffer) == before


def test_log_probabilities_of_completions():
    """Those of the micro-batch's own rows, whatever else was computed, without columns in which all are padded."""
    (batch,) = micro_batches([1.0, 1], lengths=[2, 3])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    logps = -torch.arange(1.0, 11).view(2, 5)
    others = (ids.flip(0), logps - 7)
    assert logps_of_completions([others, (ids, logps)], batch).equal(logps)
    trimmed = logps_of_completions([(ids[:, :-2], logps[:, :3])], batch)
    assert trimmed.equal(torch.nn.functional.pad(logps[:, :3], (0, 2)))
    assert logps_of_completions([(ids[:, :-3], logps[:, :2])], batch) is None  # a token is missing
    assert logps_of_completions([(ids[:1], logps[:1]), (torch.cat([ids, ids], 1), torch.ones(2, 8))], batch) is None
    assert logps_of_completions([], batch) is None


def test_iterations_and_distances():
    buffer = RolloutBuffer(micro_batches([1.0] * 6), start_step=12)  # three micro-batches
    assert [buffer.iteration(step) for step in range(12, 19)] == [1, 1, 1, 2, 2, 2, 3]
    assert [buffer.micro_batches_until(index) for index in range(3)] == [0, 1, 2]
    late = RolloutBuffer(micro_batches([1.0] * 6), start_step=13)  # made in the middle of a pass
    assert [late.iteration(step) for step in (13, 14, 15)] == [1, 1, 2]
    assert [late.micro_batches_until(index) for index in range(3)] == [2, 0, 1]


def test_shuffle_keeps_every_row():
    buffer = RolloutBuffer(micro_batches([1.0, 0, 1, 1, 0, 0, 0, 1]))
    buffer.arrange(1, skip_zero_advantage=True, by_prompt=False)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        buffer.shuffle(1, by_prompt=False)
        live = [micro_batch for micro_batch in buffer if micro_batch["completion_mask"].any()]
        rows = [row for micro_batch in live for row in micro_batch["completion_ids"][:, 0].tolist()]
        assert sorted(rows) == [0, 2, 3, 7]
        assert [len(batch["completion_ids"]) for batch in buffer] == [1, 1, 1, 1]
        seen.add(tuple(rows))
    assert len(seen) > 5


# Checkpoints


def test_saved_is_loaded(tmp_path):
    buffer = RolloutBuffer(micro_batches([1.0, 0, 1, 1]), start_step=4)
    buffer.set_old_logps(1, torch.randn(2, 5))
    buffer.save(tmp_path, 1, 2, {"step": 6})
    assert {file.name for file in tmp_path.iterdir()} == {
        "rank-00001-of-00002.json",
        "rank-00001-of-00002.safetensors",
    }
    loaded, state = RolloutBuffer.load(tmp_path, 1, 2)
    assert state["step"] == 6
    assert loaded.start_step == 4
    for mine, theirs in zip(buffer, loaded, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(value.equal(theirs[key]) and value.dtype == theirs[key].dtype for key, value in mine.items())


def test_all_that_is_known_of_rows_is_loaded(tmp_path):
    buffer = RolloutBuffer(
        [{**batch, "of.another.kind": torch.ones(2)} for batch in micro_batches([1.0, 0, 0, 0, 1, 1], lengths=[5] * 6)]
    )
    buffer.arrange(2, skip_zero_advantage=True, by_prompt=False)
    buffer.has_only_text = False  # as another process has said
    folder = tmp_path / "checkpoint-1" / "rollouts"
    buffer.save(folder, 0, 1, {})
    loaded, _ = RolloutBuffer.load(folder, 0, 1)
    assert (loaded.has_only_text, loaded.is_arranged, loaded.skips_rows) == (False, True, True)
    assert (loaded.num_skipped, loaded.padded_shape) == (buffer.num_skipped, buffer.padded_shape) == (3, (2, 8))
    assert [loaded.left_out(index) for index in range(3)] == [LeftOut(3, 3, 15), LeftOut(), LeftOut()]
    assert [loaded.is_placeholder(index) for index in range(3)] == [False, True, False]
    assert "of.another.kind" in loaded[0]
    fresh = RolloutBuffer(micro_batches([1.0, 1]))
    assert (fresh.is_arranged, fresh.skips_rows, fresh.left_out(0)) == (False, False, LeftOut())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, state: tensors.write_bytes(tensors.read_bytes()[:-7]), "safetensors is damaged"),
        (lambda tensors, state: tensors.write_bytes(tensors.read_bytes()[:-7] + b"abcdefg"), "safetensors is damaged"),
        (lambda tensors, state: tensors.unlink(), "safetensors is missing"),
        (lambda tensors, state: state.unlink(), "json is missing"),
        (lambda tensors, state: state.write_text(state.read_text()[:20]), "json is no state of rollouts"),
        (lambda tensors, state: state.write_text("[]"), "json is no state of rollouts"),
        (lambda tensors, state: state.write_text('{"format": 99}'), "has format 99, this version reads 2"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    RolloutBuffer(micro_batches([1.0, 1.0])).save(tmp_path, 0, 1, {})
    damage(tmp_path / "rank-00000-of-00001.safetensors", tmp_path / "rank-00000-of-00001.json")
    with pytest.raises(RolloutError, match=message) as error:
        RolloutBuffer.load(tmp_path, 0, 1)
    assert "delete the folder" in str(error.value)
    assert "\n" not in str(error.value)


# (num_iterations, gradient_accumulation_steps, steps_per_generation)
SCHEDULES = [(3, 1, 1), (2, 1, 3), (2, 2, 4), (2, 2, 3), (1, 4, 2)]


def train(policy, output_dir, schedule=(2, 1, 1), resume=None, lora=False, trainer_class=GRPOExtTrainer, **options):
    options = {
        **schedule_options(*schedule),
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 1,
        **options,
    }
    config_class = GRPOExtConfig if trainer_class is GRPOExtTrainer else GRPOConfig
    passed = {"peft_config": LoraConfig(r=2, init_lora_weights=False)} if lora else {}
    return train_canned(
        trainer_class, canned_config(output_dir, config_class, **options), policy, resume=resume, **passed
    )


@pytest.mark.parametrize(
    ("schedule", "options"),
    [pytest.param(schedule, {}, marks=[] if n == 2 else [pytest.mark.slow]) for n, schedule in enumerate(SCHEDULES)]
    + [
        pytest.param((3, 1, 2), {"lora": True}, marks=pytest.mark.slow),
        pytest.param((3, 1, 2), {"reshuffle_iterations": True}, marks=pytest.mark.slow),
        pytest.param((4, 1, 2), {"target_kl": 0.005, "learning_rate": 2.0}, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), {"beta": 0.04, "optim": "adamw_torch", "learning_rate": 1e-2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resuming_is_exact(policy, tmp_path, schedule, options):
    """From every checkpoint, between two passes or within one, the run ends where it would have ended."""
    straight = train(policy, tmp_path / "straight", schedule, **options)
    for step in (1, 3, 4, 6):
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed = train(policy, tmp_path / "resumed", schedule, resume=checkpoint, **options)
        assert straight.exact_grad_norms[-1] > 0
        assert resumed.trainer.state.global_step == 8
        assert_same_weights(resumed.weights, straight.weights)
        assert resumed.exact_grad_norms == straight.exact_grad_norms[step:]
        assert resumed.trainer.rollout_func.num_calls < straight.trainer.rollout_func.num_calls


@pytest.mark.slow
def test_resuming_in_a_later_epoch_is_exact(policy, tmp_path):
    """The order of prompts goes on as well: an epoch of 64 prompts ends after 32 steps."""
    options = {"max_steps": 38}
    straight = train(policy, tmp_path / "straight", (2, 2, 4), **options)
    assert straight.trainer.state.epoch > 1
    for step in (32, 34):  # where an epoch ends, and between two passes in the next one
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed = train(policy, tmp_path / "resumed", (2, 2, 4), resume=checkpoint, **options)
        assert_same_weights(resumed.weights, straight.weights)


def test_trl_alone_is_not_exact(policy, tmp_path):
    """What the checkpoint's rollouts are for; when this fails, TRL has learned it."""
    straight = train(policy, tmp_path / "a", (3, 1, 1), trainer_class=GRPOTrainer)
    resumed = train(
        policy, tmp_path / "b", (3, 1, 1), trainer_class=GRPOTrainer, resume=str(tmp_path / "a" / "checkpoint-4")
    )
    assert resumed.exact_grad_norms != straight.exact_grad_norms[4:]


def test_resuming_with_a_damaged_file(policy, tmp_path, caplog):
    train(policy, tmp_path / "straight", (3, 1, 1), max_steps=2)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    tensors = checkpoint / FOLDER / "rank-00000-of-00001.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(RolloutError, match=r"rank-00000-of-00001.safetensors is damaged .* delete the folder"):
        train(policy, tmp_path / "resumed", (3, 1, 1), resume=str(checkpoint))
    for file in (checkpoint / FOLDER).iterdir():
        file.unlink()
    (checkpoint / FOLDER).rmdir()
    resumed = train(policy, tmp_path / "resumed", (3, 1, 1), resume=str(checkpoint))
    assert "There are no rollouts" in caplog.text
    # fresh ones for the pass that was left, then on with the schedule
    assert resumed.trainer.rollout_func.num_calls == 3


def test_resuming_with_a_foreign_file(policy, tmp_path):
    train(policy, tmp_path / "straight", (3, 1, 1), max_steps=2)
    first, second = (tmp_path / "straight" / f"checkpoint-{step}" / FOLDER for step in (1, 2))
    for file in first.iterdir():
        file.replace(second / file.name)
    with pytest.raises(RolloutError, match="is of step 1, this checkpoint of step 2"):
        train(policy, tmp_path / "resumed", (3, 1, 1), resume=str(second.parent))


# What the rows were sampled with, which of them were left out, and by which loss they were dealt out.
@pytest.mark.parametrize(
    "change",
    [
        {"schedule": (4, 1, 1)},
        {"schedule": (3, 1, 1), "num_generations": 2},
        {"schedule": (3, 1, 1), "loss_type": "sapo"},
        {"schedule": (3, 1, 1), "loss_type": "bnpo"},
        {"schedule": (3, 1, 1), "beta": 0.1},
        {"schedule": (3, 1, 1), "temperature": 0.5},
        {"schedule": (3, 1, 1), "skip_zero_advantage": False},
        "processes",
    ],
    ids=str,
)
def test_resuming_with_other_settings(policy, tmp_path, caplog, change):
    train(policy, tmp_path / "straight", (3, 1, 1), max_steps=2)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    if change == "processes":
        for file in (checkpoint / FOLDER).iterdir():
            file.rename(file.with_name(file.name.replace("of-00001", "of-00002")))
        change = {"schedule": (3, 1, 1)}
    resumed = train(policy, tmp_path / "resumed", resume=str(checkpoint), **change)
    assert resumed.trainer.state.global_step == 8
    assert caplog.text.count("going on with fresh") == 1


@pytest.mark.parametrize("change", [{"logging_steps": 4}, {"learning_rate": 0.1}, {"target_kl": 5.0}], ids=str)
def test_resuming_with_settings_that_leave_rows_alone(policy, tmp_path, caplog, change):
    train(policy, tmp_path / "straight", (3, 1, 1), max_steps=2)
    checkpoint = str(tmp_path / "straight" / "checkpoint-2")
    resumed = train(policy, tmp_path / "resumed", (3, 1, 1), resume=checkpoint, max_steps=3, **change)
    assert "going on with fresh" not in caplog.text
    assert resumed.trainer.rollout_func.num_calls == 0


def other_reward(prompts, completion_ids, **kwargs):
    return [float(ids[0] % 3) for ids in completion_ids]


def test_resuming_with_another_reward(policy, tmp_path, caplog):
    train(policy, tmp_path / "straight", (3, 1, 1), max_steps=2)
    args = canned_config(tmp_path / "resumed", GRPOExtConfig, num_iterations=3, max_steps=3)
    resume = str(tmp_path / "straight" / "checkpoint-2")
    train_canned(GRPOExtTrainer, args, policy, resume=resume, reward=other_reward)
    assert "rewards: 'canned_reward' to 'other_reward'" in caplog.text


@pytest.mark.slow
def test_resuming_a_stream_in_a_later_epoch(policy, tmp_path, monkeypatch):
    """Data without a length: an epoch ends when they do."""
    monkeypatch.setattr(
        "canned.canned_prompts", lambda kinds: canned_prompts(kinds, num_prompts=8).to_iterable_dataset()
    )
    schedule, options = (2, 2, 4), {"max_steps": 10}
    straight = train(policy, tmp_path / "straight", schedule, **options)
    assert straight.trainer.state.epoch > 1
    for step in (4, 6):  # where the second epoch begins, and between two passes in it
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed = train(policy, tmp_path / "resumed", schedule, resume=checkpoint, **options)
        assert_same_weights(resumed.weights, straight.weights)
    longer = train(policy, tmp_path / "longer", schedule, resume=checkpoint, max_steps=12)  # the rest is as it was
    assert longer.exact_grad_norms[:4] == straight.exact_grad_norms[6:]


def test_rollouts_that_a_file_cannot_hold(policy, tmp_path, caplog):
    """A checkpoint is without them, and the run goes on; resumed, it generates."""

    class WithSources(GRPOExtTrainer):
        def _generate_and_score_completions(self, inputs):
            return {**super()._generate_and_score_completions(inputs), "sources": [{1, 2}] * len(inputs)}

    args = {"num_iterations": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    train_canned(WithSources, canned_config(tmp_path, GRPOExtConfig, **args), policy)
    assert "which hold what a file cannot (sources: [{1, 2}" in caplog.text
    assert not (tmp_path / "checkpoint-1" / FOLDER).exists()
    resumed = train(policy, tmp_path, (3, 1, 1), resume=str(tmp_path / "checkpoint-1"), max_steps=3)
    assert resumed.trainer.rollout_func.num_calls == 1


class Terminate(TrainerCallback):
    """As if SIGTERM had come, and its time had passed, while a step was computed."""

    def __init__(self, at_step):
        self.at_step = at_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            callbacks = self.trainer.callback_handler.callbacks
            (callback,) = [callback for callback in callbacks if isinstance(callback, JITCheckpointCallback)]
            callback.jit_manager.is_checkpoint_requested = True


@pytest.mark.parametrize("at_step", [2, 3, 5])  # a pass, a batch of rollouts, or both end there
def test_a_checkpoint_on_a_signal_resumes_exactly(policy, tmp_path, at_step):
    options = {"save_steps": 50, "enable_jit_checkpoint": True}
    straight = train(policy, tmp_path / "straight", (3, 1, 1), **options)
    terminate = Terminate(at_step)
    args = {"num_iterations": 3, "max_steps": 8, "save_strategy": "steps", **options}

    class Terminated(GRPOExtTrainer):
        def train(self, *args, **kwargs):
            terminate.trainer = self
            return super().train(*args, **kwargs)

    ended = train_canned(
        Terminated, canned_config(tmp_path / "ended", GRPOExtConfig, **args), policy, callbacks=[terminate]
    )
    assert ended.trainer.state.global_step == at_step + 1
    resumed = train(policy, tmp_path / "ended", (3, 1, 1), resume=True, **options)
    assert resumed.trainer.state.global_step == 8
    assert_same_weights(resumed.weights, straight.weights)
    assert ended.trainer.rollout_func.num_calls + resumed.trainer.rollout_func.num_calls == 3


def test_rollouts_are_left_out_on_request(policy, tmp_path):
    train(policy, tmp_path, save_rollouts=False, max_steps=1)
    assert (tmp_path / "checkpoint-1").is_dir()
    assert not (tmp_path / "checkpoint-1" / FOLDER).exists()


# Processes of their own


OPTIONS = {
    "num_iterations": 3,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "mask_truncated_completions": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_killed_and_resumed(policy, tmp_path, lora):
    settings = {"policy": policy, "options": OPTIONS, "lora": lora}
    straight = run_canned(tmp_path, "straight", **settings)
    assert straight.returncode == 0, straight.stderr[-3000:]
    killed = run_canned(tmp_path, "killed", kill_at=3, **settings)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "final.safetensors").exists()
    resumed = run_canned(tmp_path, "killed", resume=str(tmp_path / "killed" / "checkpoint-3"), **settings)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_weights(
        load_file(tmp_path / "killed" / "final.safetensors"), load_file(tmp_path / "straight" / "final.safetensors")
    )
