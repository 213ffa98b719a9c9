"""The option `answer_extractor`: names, functions, and several one after the other."""

import pickle
import re

import pytest

from trl_grpo_ext.rewards import (
    ANSWER_EXTRACTORS,
    extract_tagged_answer,
    extract_xml_answer,
    get_answer_extractor,
    get_correctness_reward,
    get_exact_correctness_reward,
    get_int_reward,
    gsm8k_bundle,
    tag_bundle,
)
from trl_grpo_ext.rewards.extractors import completion_giving


def last_word(text):
    return text.split()[-1]


def first_match(text):
    return re.search(r"answer is (\d+)", text).group(1)  # as people write it: raises where there is none


def as_a_number(text):
    return int(text)


TEXT = "<think>Is it \\boxed{1}?</think>\n#### 2\n\\boxed{\\text{it is }3} <answer>4</answer> or 5"


@pytest.mark.parametrize(
    ("answer_extractor", "answer"),
    [
        ("tag", "4"),
        ("xml", "4"),
        ("boxed", r"\text{it is }3"),
        ("hash", "2"),
        ("last_number", "5"),
        ("think", TEXT.partition("</think>\n")[2]),
        ("none", TEXT),
        (last_word, "5"),
        (("think", "boxed"), r"\text{it is }3"),
        (["think", "boxed", "last_number"], "3"),
        (("boxed",), r"\text{it is }3"),
        (("think", last_word), "5"),
        (("hash", "boxed"), None),
    ],
)
def test_an_answer_is_found(answer_extractor, answer):
    find = get_answer_extractor(answer_extractor)
    assert find(TEXT) == answer
    assert pickle.loads(pickle.dumps(find))(TEXT) == answer
    for get_reward in (get_correctness_reward, get_exact_correctness_reward):
        reward = pickle.loads(pickle.dumps(get_reward(answer_extractor=answer_extractor)))
        assert reward == get_reward(answer_extractor=answer_extractor)
        assert hash(reward) == hash(get_reward(answer_extractor=answer_extractor))
        assert reward.extract(TEXT) == answer


def test_a_box_in_the_reasoning_is_no_answer():
    tried = r"<think>\boxed{14} would be right.</think>"
    boxed, after_thinking = (get_correctness_reward(answer_extractor=name) for name in ("boxed", ("think", "boxed")))
    assert boxed(completions=[tried, rf"{tried} \boxed{{14}}"], answer=["14"] * 2) == [2.0, 2.0]
    assert after_thinking(completions=[tried, rf"{tried} \boxed{{14}}"], answer=["14"] * 2) == [0.0, 2.0]


@pytest.mark.parametrize(
    ("tag", "text", "tagged", "xml"),
    [
        (("<SOLUTION>", "</SOLUTION>"), "<SOLUTION>1</SOLUTION><SOLUTION> 2 </SOLUTION>.", "2", "2"),
        (("<SOLUTION>", "</SOLUTION>"), "1<SOLUTION> 2", None, "2"),
        (("Answer:", ""), "Answer: 1\nAnswer: 2 \n", "2", "2"),
        (("Answer:", ""), "2", None, "2"),
        (("Answer:", ""), "Answer: ", None, ""),
        (("", "</final>"), " 1</final> 2</final>", "1", "1"),
        (("", "</final>"), "1", None, "1"),
    ],
)
def test_tags_of_two_texts(tag, text, tagged, xml):
    assert extract_tagged_answer(text, tag) == tagged
    assert extract_xml_answer(text, tag) == xml
    assert get_correctness_reward(answer_tag=tag).extract(text) == tagged
    assert get_correctness_reward(answer_tag=list(tag)) == get_correctness_reward(answer_tag=tag)


def test_a_function_that_fails_finds_no_answer():
    reward = get_correctness_reward(answer_extractor=first_match)
    assert reward(completions=["The answer is 14.", "14", ""], answer=["14"] * 3) == [2.0, 0.0, 0.0]
    for answer_extractor in (as_a_number, ("boxed", as_a_number)):
        text = "14" if callable(answer_extractor) else r"\boxed{14}"
        for factory in (get_correctness_reward, get_int_reward):
            reward = factory(answer_extractor=answer_extractor)
            paid = reward(completions=[text, "x", ""], answer=["14"] * 3)
            assert paid == [reward.full_marks, 0.0, 0.0]


@pytest.mark.parametrize("answer_extractor", [*ANSWER_EXTRACTORS, ("think", "boxed"), ["think", "tag"], ("hash",)])
@pytest.mark.parametrize("answer_tag", ["answer", ("<SOLUTION>", "</SOLUTION>"), ("Answer:", "")])
@pytest.mark.parametrize("answer", ["14", "-3.5"])
def test_a_completion_that_gives_an_answer(answer_extractor, answer_tag, answer):
    completion = completion_giving(answer, answer_extractor, answer_tag)
    assert get_answer_extractor(answer_extractor, answer_tag=answer_tag)(completion) == answer


def test_a_completion_that_a_function_finds_its_answer_in():
    assert last_word(completion_giving("14", last_word)) == "14"
    assert completion_giving("14", ("boxed", last_word)) == r"\boxed{14}"
    assert completion_giving("14", first_match) is None
    assert completion_giving("14", ("think", first_match)) is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("box", "got 'box': did you mean boxed"),
        (("think", "box"), "did you mean boxed"),
        ((), r"got \(\)"),
        (None, "got None"),
        ({"a": 1}, "got {'a': 1}"),
        ((("think",), "boxed"), r"got \(\('think',\), 'boxed'\)"),
    ],
)
def test_what_is_no_extractor_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        get_answer_extractor(bad)
    for factory in (get_correctness_reward, get_exact_correctness_reward, get_int_reward):
        with pytest.raises(ValueError, match=f"{factory().name}: answer_extractor must be one of .*{message}"):
            factory(answer_extractor=bad)


@pytest.mark.parametrize("bad", [("", ""), ("a", "a"), (" ", "x"), ("x", "\n"), ("a",), ("a", 1), "<answer>"])
def test_what_is_no_answer_tag_is_refused(bad):
    with pytest.raises(ValueError, match="correctness_reward_func: answer_tag must be a tag's name"):
        get_correctness_reward(answer_tag=bad)


def test_bundles_take_formats_by_name():
    tags = (("<start_working_out>", "<end_working_out>"), ("<SOLUTION>", "</SOLUTION>"))
    text = "<start_working_out>\nr\n<end_working_out>\n<SOLUTION>\n14\n</SOLUTION>"
    bundle = gsm8k_bundle(tags=tags, answer_column="target")
    assert [reward(completions=[text], target=["14"])[0] for reward in bundle] == [0.5, 0.5, 0.5, 0.5, 2.0]
    opened = tag_bundle(tags=(("", "</think>"), "answer"), answer_extractor=("think", "tag"))
    text = "It is <answer>15</answer></think><answer>14</answer>"
    assert [reward(completions=[text], answer=["14"])[0] for reward in opened] == [2.0, pytest.approx(0.6)]
    assert opened[1].full_marks == pytest.approx(0.6)
    with pytest.raises(ValueError, match="xmlcount_reward_func: tags must be a tag's name"):
        gsm8k_bundle(tags=(("", "</think>"), "answer"))
