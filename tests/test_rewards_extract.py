import pytest

from trl_grpo_ext.rewards import (
    extract_boxed_answer,
    extract_hash_answer,
    extract_last_number,
    extract_tagged_answer,
    extract_xml_answer,
)


@pytest.mark.parametrize(
    ("text", "xml", "tagged"),
    [
        ("<answer>\n72\n</answer>", "72", "72"),
        ("<answer>72</answer> and so on", "72", "72"),
        ("  just a text \n", "just a text", None),
        ("", "", None),
        ("<answer> 72", "72", None),
        ("72 </answer> more", "72", None),
        ("<answer>1</answer><answer>2</answer>", "2", "2"),
        ("<answer>1</answer><answer>2", "2", None),
        ("<answer>a<answer>b</answer>c</answer>", "b", "b"),
        ("</answer><answer>3</answer></answer>", "3", "3"),
        ("<answer>...</answer>", "...", None),
        ("<answer>\n...\n</answer>", "...", None),
        ("<answer></answer>", "", ""),
    ],
)
def test_answer_in_tags(text, xml, tagged):
    assert extract_xml_answer(text) == xml
    assert extract_tagged_answer(text) == tagged


def test_other_tag():
    assert extract_xml_answer("<final>5</final>", tag="final") == "5"
    assert extract_tagged_answer("<answer>4</answer><final>5</final>", tag="final") == "5"
    assert extract_tagged_answer("<answer>4</answer>", tag="final") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 3 + 4 = <<3+4=7>>7.\n#### 7", "7"),
        ("#### 1,080", "1,080"),
        ("#### 5\nmore", "5"),
        ("#### 4\n#### 5 ", "5"),
        ("no marker 7", None),
        ("####7", "7"),
        ("####", None),
        ("#### ", None),
        ("", None),
    ],
)
def test_hash_answer(text, answer):
    assert extract_hash_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("first 3 and then 4.", "4"),
        ("1,080 stickers", "1,080"),
        ("it is -3/4 of it", "-3/4"),
        ("costs -$5.50!", "-$5.50"),
        (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert extract_last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x = \boxed{72}$.", "72"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{ 2 } holds {3}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 12$ and 13", "12"),
        (r"\(\boxed5\) or 6", "5"),
        ("\\boxed 5\n6", "5"),
        (r"\fbox{4}", "4"),
        (r"\boxed{3} \fbox{4}", "3"),
        (r"\boxed{3} \boxedtext{4}", "3"),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{", None),
        (r"\boxed", None),
        (r"\boxed{}", None),
        (r"\boxed{...}", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_boxed_answer(text, answer):
    assert extract_boxed_answer(text) == answer
