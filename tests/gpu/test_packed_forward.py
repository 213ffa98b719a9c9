"""Packed forwards of models on a GPU against padded ones, whatever attention they have."""

from copy import deepcopy

import pytest
import torch
from on_gpu import (
    DEVICE,
    HALF,
    NEEDS_COMPILER,
    ON_GPU,
    OURS,
    TRL,
    assert_no_worse,
    errors,
    has_flash_attention,
    logps_and_gradient,
    logps_by_row,
    make_model,
    make_rows,
    make_trainer,
    of_trainer,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available


pytestmark = ON_GPU

ROWS = [(0, 33, 70), (1, 1, 9), (0, 33, 1), (2, 150, 128), (1, 1, 0), (2, 150, 66), (0, 33, 12), (3, 2, 2)]


def exact(model, rows):
    """Log-probabilities and gradient of a model's weights, each row by itself, in fp64."""
    oracle = deepcopy(model).to(DEVICE).double()
    return logps_and_gradient(oracle, logps_by_row(oracle, *rows))


def test_float32(tmp_path):
    """Segment by segment: no kernel takes full precision there."""
    rows, model = make_rows(ROWS), make_model()
    expected = exact(model, rows)
    trainer = make_trainer(OURS, model, tmp_path)
    assert trainer.packs
    assert max(errors(of_trainer(trainer, *rows), expected)) < 1e-4


@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype, size, tmp_path):
    rows = make_rows(ROWS)
    model = make_model(HALF[dtype], size)
    expected = exact(model, rows)
    padded, packed = (make_trainer(classes, deepcopy(model), tmp_path) for classes in (TRL, OURS))
    assert packed.packs
    assert_no_worse(of_trainer(packed, *rows), of_trainer(padded, *rows), expected)


def test_autocast(tmp_path):
    """Weights in fp32, and what is computed in bf16, as TRL trains by default."""
    rows, model = make_rows(ROWS), make_model()
    expected = exact(model, rows)
    padded, packed = (make_trainer(classes, deepcopy(model), tmp_path, bf16=True) for classes in (TRL, OURS))
    assert packed.packs
    assert_no_worse(of_trainer(packed, *rows), of_trainer(padded, *rows), expected)


@pytest.mark.parametrize(
    "name",
    ["sdpa", pytest.param("flex_attention", marks=NEEDS_COMPILER), "flash_attention_2", "flash_attention_3"],
)
def test_attention_implementations(name, tmp_path):
    """Each that is there packs, and rounds no more than TRL's trainer with the same one."""
    if name == "flash_attention_2" and not (is_flash_attn_2_available() and has_flash_attention()):
        pytest.skip("FlashAttention 2 is not installed, or not for this card")
    if name == "flash_attention_3" and not (
        is_flash_attn_3_available() and torch.cuda.get_device_capability(DEVICE)[0] == 9
    ):
        pytest.skip("FlashAttention 3 is not installed, or not for this card")
    rows = make_rows(ROWS)
    expected = exact(make_model(torch.bfloat16), rows)
    padded, packed = (
        make_trainer(classes, make_model(torch.bfloat16, attn_implementation=name), tmp_path)
        for classes in (TRL, OURS)
    )
    assert packed.packs
    assert packed.model.config._attn_implementation == name
    assert_no_worse(of_trainer(packed, *rows), of_trainer(padded, *rows), expected)
