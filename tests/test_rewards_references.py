"""What a cell of an answer column may hold, whatever library has put it there."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from trl_grpo_ext.rewards import (
    check_references,
    correctness_reward_func,
    numerically_equal,
    parse_number,
    reference_to_text,
    tag_bundle,
)
from trl_grpo_ext.rewards.references import is_missing


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" 72\n", "72"),
        ("He has 72.\n#### 1,080", "1,080"),
        ("####42", "42"),
        (72, "72"),
        (72.0, "72"),
        (72.5, "72.5"),
        (True, "True"),
        (1e22, "1" + "0" * 22),
        (Decimal("72"), "72"),
        (Decimal("72.00"), "72"),
        (Decimal("7.2E+1"), "72"),
        (Decimal("0.10"), "0.10"),
        (Decimal("1E+999999"), "1E+999999"),
        (Fraction(3, 4), "3/4"),
        (Fraction(8, 4), "2"),
        (np.int64(72), "72"),
        (np.uint8(72), "72"),
        (np.float32(72), "72"),
        (np.float32(0.1), "0.1"),
        (np.float64(72.5), "72.5"),
        (np.float16(0.1), "0.1"),
        (np.bool_(True), "True"),
        (np.str_("72"), "72"),
        (np.array(72), "72"),
        (torch.tensor(72), "72"),
        (torch.tensor(0.1), "0.1"),
        (torch.tensor(0.5, requires_grad=True), "0.5"),
        # nothing to compare with
        (None, None),
        ("", None),
        ("#### ", None),
        (float("nan"), None),
        (float("inf"), None),
        (Decimal("NaN"), None),
        (Decimal("sNaN"), None),
        (Decimal("Infinity"), None),
        (np.float32("nan"), None),
        (pd.NA, None),
        (pd.NaT, None),
        (["72"], None),
        ({"value": 72}, None),
        (b"72", None),
        (np.array([72, 73]), None),
        (torch.tensor([72, 73]), None),
    ],
    ids=repr,
)
def test_reference_to_text(value, text):
    assert reference_to_text(value) == text


@pytest.mark.parametrize("value", [None, "", " \n", float("nan"), Decimal("NaN"), Decimal("sNaN"), pd.NA, pd.NaT])
def test_cells_that_hold_nothing(value):
    assert is_missing(value) is True
    check_references(tag_bundle(), [{"answer": value}, {"answer": "72"}])


@pytest.mark.parametrize("value", ["x", 0, False, float("inf"), [], ["72"], np.array([1, 2]), "#### "])
def test_cells_that_hold_something_else_than_a_reference(value):
    assert is_missing(value) is False


def tagged(answer):
    return f"<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("value", "given", "score"),
    [
        (np.float32(72), "72", 2.0),
        (np.float32(0.1), "0.1", 2.0),
        (np.float32(0.1), ".10", 1.5),
        (np.float64(72.5), "72.5", 2.0),
        (np.int64(72), "72.0", 1.5),
        (Decimal("72.00"), "72", 2.0),
        (Fraction(3, 4), "0.75", 1.5),
        (torch.tensor(72), "72", 2.0),
        (np.float32("nan"), "nan", None),
        (Decimal("NaN"), "NaN", None),
        (pd.NA, "<NA>", None),
    ],
    ids=repr,
)
def test_references_of_any_library_are_scored(value, given, score):
    assert correctness_reward_func(completions=[tagged(given)], answer=[value]) == [score]


def test_a_column_of_pandas_is_scored():
    column = pd.Series([72, pd.NA, 73], dtype="Int64")
    texts = [tagged("72")] * 3
    assert correctness_reward_func(completions=texts, answer=column) == [2.0, None, 0.0]
    check_references(tag_bundle(), pd.DataFrame({"answer": column}).to_dict("records"))


@pytest.mark.parametrize("value", [np.int64(72), np.float32(72), np.float64(72), Decimal(72), Fraction(72), 72, 72.0])
def test_numbers_of_any_kind_are_compared(value):
    assert parse_number(value) == 72
    assert type(parse_number(value).numerator) is int  # numpy's would overflow
    assert numerically_equal(value, "72.0")
    assert not numerically_equal(value, "73")


def test_integers_may_be_longer_than_python_reads():
    """Python turns no more digits than a limit (4,300, or what the environment says) into an integer, or back."""
    code = """
import sys
from decimal import Decimal
from trl_grpo_ext.rewards import *

assert sys.get_int_max_str_digits() == 640
for digits in (600, 900, 5_000):
    number, text = 10 ** (digits - 1), "1" + "0" * (digits - 1)
    completions = [f"<answer>{answer}</answer>" for answer in (text, text + "1", text + ".0", f"{text}/{text}")]
    for reference in (number, text, Decimal(number), f"#### {text}"):
        scores = correctness_reward_func(completions=completions, answer=[reference] * 4)
        assert scores == [2.0, 0.0, 1.5 if digits < 1_000 else 0.0, 0.0], (digits, scores)
    assert numerically_equal(text, number) is (digits <= 1_000)
    assert numerically_equal(number, number) and not numerically_equal(number, number + 1)
    for bundle in (gsm8k_bundle(), tag_bundle()):
        check_references(bundle, [{"answer": number}, {"answer": text}])
    report = audit(tag_bundle(), [{"answer": number, "solution": f"<reasoning></reasoning><answer>{text}</answer>"}])
    assert report.ok
    parse_number(f"1e{text}"), parse_number(f"{text}e5"), parse_plain_number(f"1,{'000,' * digits}000")
"""
    subprocess.run([sys.executable, "-X", "int_max_str_digits=640", "-c", code], check=True, timeout=60)
