import math
import pickle
import random
import re

import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trl_grpo_ext.rewards import (
    format_reward_func,
    get_format_reward,
    get_int_reward,
    get_soft_format_reward,
    get_strict_format_reward,
    get_xmlcount_reward,
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)


STRICT = "<reasoning>\nr\n</reasoning>\n<answer>\n72\n</answer>"  # 50 characters
LOOSE = "<reasoning>r</reasoning><answer>72</answer>"
TWICE = f"{STRICT}\n{STRICT}"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (f"{STRICT}\n", 0.5),
        # no final line break: charged the whole text's length once, and refunded one character
        (STRICT, 0.5 - 0.001 * len(STRICT) + 0.001),
        (f"{STRICT}\nabc", 0.5 - 0.001 * 3 - 0.001 * 3),
        (f"{STRICT}abc", 0.5 - 0.001 * (len(STRICT) + 3) - 0.001 * 2),
        ("<reasoning>\n", 0.125),
        ("\n</reasoning>\n", 0.125),
        ("\n<answer>\n", 0.125 - 0.001 * 10),
        ("\n</answer>", 0.125 + 0.001),
        ("\n</answer>x", 0.125),
        ("<reasoning>\n<reasoning>\n", 0.0),
        (LOOSE, 0.0),
        ("", 0.0),
        ("no tags at all", 0.0),
    ],
)
def test_xmlcount(text, score):
    assert xmlcount_reward_func(completions=[text]) == [pytest.approx(score, abs=1e-12)]


@pytest.mark.parametrize(
    ("text", "soft", "strict"),
    [
        (STRICT, 0.5, 0.5),
        (LOOSE, 0.5, 0.0),
        ("<reasoning>a\nb\nc</reasoning>\n \t\n<answer>7\n8</answer>", 0.5, 0.0),
        ("<reasoning>\na\n\nb\n</reasoning>\n<answer>\n7\n8\n</answer>", 0.5, 0.5),
        ("<reasoning></reasoning><answer></answer>", 0.5, 0.0),
        ("<reasoning>\n\n</reasoning>\n<answer>\n\n</answer>", 0.5, 0.5),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 0.5, 0.0),
        (f"{STRICT}\n", 0.0, 0.0),
        (f" {STRICT}", 0.0, 0.0),
        (f"{STRICT} thanks", 0.0, 0.0),
        (TWICE, 0.5, 0.5),
        ("<reasoning>a</reasoning> then <answer>7</answer>", 0.0, 0.0),
        ("<reasoning>a<answer>7</answer>", 0.0, 0.0),
        ("<answer>7</answer><reasoning>a</reasoning>", 0.0, 0.0),
        ("<reasoning></reasoning></answer>", 0.0, 0.0),
        ("<reasoning><answer></answer>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_layout(text, soft, strict):
    assert soft_format_reward_func(completions=[text]) == [soft]
    assert strict_format_reward_func(completions=[text]) == [strict]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>72</answer>", 0.5),
        ("<answer>\n 72 \n</answer>", 0.5),
        ("72", 0.5),
        ("<answer>7</answer><answer>x</answer>", 0.0),
        ("<answer>-72</answer>", 0.0),
        ("<answer>1,080</answer>", 0.0),
        ("<answer>7.0</answer>", 0.0),
        ("<answer>$7</answer>", 0.0),
        ("<answer>²</answer>", 0.5),  # `str.isdigit` says so
        ("", 0.0),
    ],
)
def test_int(text, score):
    assert int_reward_func(completions=[text]) == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (STRICT, 0.8),
        (TWICE, 0.8),
        ("</answer><reasoning>", 0.4),
        ("<answer>", 0.2),
        ("<reasoning><answer></answer>", 0.6),
        ("reasoning answer", 0.0),
        ("", 0.0),
    ],
)
def test_tags(text, score):
    assert format_reward_func(completions=[text]) == [pytest.approx(score, abs=1e-12)]


# Texts from the pieces that matter, so that most of them are nearly right.
PIECES = st.sampled_from(
    ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "72", "x", "<", "<reasoning>\n", "\n</answer>"]
)
TAGGED_TEXT = st.lists(PIECES, max_size=14).map("".join) | st.builds(
    "<reasoning>{}</reasoning>{}<answer>{}</answer>{}".format, *[st.lists(PIECES, max_size=3).map("".join)] * 4
)


@given(TAGGED_TEXT | st.text())
def test_scores_are_the_notebooks(text):
    scored = {
        xmlcount_reward_func: oracle.xmlcount,
        soft_format_reward_func: oracle.soft_format,
        strict_format_reward_func: oracle.strict_format,
        int_reward_func: oracle.int_reward,
        format_reward_func: oracle.tags,
    }
    for reward_func, oracle_func in scored.items():
        (score,) = reward_func(completions=[text])
        assert math.isclose(score, oracle_func(text), abs_tol=1e-12), reward_func.__name__


# Tags that can share their line breaks with the next one: `str.count` and `str.split` find them from the left.
OVERLAPPING = st.lists(
    st.sampled_from(["\n", "</answer>", "\n</answer>\n", "\n<answer>\n", "<answer>", "</reasoning>\n", "x"]),
    max_size=12,
).map("".join)


@given(OVERLAPPING, OVERLAPPING)
@example("\n<answer>\n", "\n</answer>\n</answer>\n")
def test_tags_that_overlap_count_as_in_the_notebooks(before, after):
    text = f"{before}\n<answer>\n{after}"
    assert math.isclose(score_of(xmlcount_reward_func, text), oracle.xmlcount(text), abs_tol=1e-12)


def score_of(reward_func, text):
    (score,) = reward_func(completions=[text])
    return score


def test_xmlcount_options():
    assert score_of(get_xmlcount_reward(score_per_tag=1.0), f"{STRICT}\n") == 4.0
    assert score_of(get_xmlcount_reward(penalty_per_char=0.01), f"{STRICT}\nabc") == pytest.approx(0.5 - 0.06)
    assert score_of(get_xmlcount_reward(penalty_per_char=0.0), f"{STRICT}abc") == 0.5
    lenient = get_xmlcount_reward(final_newline_penalty=False)
    assert score_of(lenient, STRICT) == 0.5
    assert score_of(lenient, f"{STRICT}\n") == 0.5
    assert score_of(lenient, f"{STRICT}\nabc") == pytest.approx(0.5 - 0.006)
    assert score_of(lenient, f"{STRICT}abc") == pytest.approx(0.5 - 0.006)
    other = get_xmlcount_reward(tags=("think", "final"))
    assert score_of(other, "<think>\nr\n</think>\n<final>\n7\n</final>\n") == 0.5
    assert score_of(other, f"{STRICT}\n") == 0.0


def test_layout_options():
    for get_reward in (get_soft_format_reward, get_strict_format_reward):
        assert score_of(get_reward(score=3.0), STRICT) == 3.0
        once = get_reward(exactly_once=True)
        assert score_of(once, STRICT) == 0.5
        assert score_of(once, TWICE) == 0.0
        assert score_of(once, STRICT.replace("72", "72 <answer>")) == 0.0
        other = get_reward(tags=("think", "final"))
        assert score_of(other, "<think>\nr\n</think>\n<final>\n7\n</final>") == 0.5
        assert score_of(other, STRICT) == 0.0
        either_end = get_reward(final_newline=True)
        assert [score_of(either_end, STRICT + end) for end in ("", "\n", "\n\n", " ")] == [0.5, 0.5, 0.0, 0.0]


def test_int_and_tag_options():
    assert score_of(get_int_reward(score=2.0), "<answer>7</answer>") == 2.0
    written = get_int_reward(signs_and_commas=True)
    for answer in ("7", "-7", "+7", "\u22127", "1,080", "-1,575,000", "²"):
        assert score_of(written, f"<answer>{answer}</answer>") == 0.5, answer
    for answer in ("", "-", "1,08", "1,0800", ",080", "0,080", "7.0", "$7", "- 7", "--7", "7 8"):
        assert score_of(written, f"<answer>{answer}</answer>") == 0.0, answer
    assert score_of(get_int_reward(answer_tag="final"), "<answer>x</answer><final>7</final>") == 0.5
    assert score_of(get_format_reward(score_per_tag=1.0), STRICT) == 4.0
    assert score_of(get_format_reward(tags=("think", "final")), "<think></think><final>") == pytest.approx(0.6)


# Formats by their sections, with what each has between them.
FORMATS = [
    ["reasoning", "answer"],
    [("<start_working_out>", "<end_working_out>"), ("<SOLUTION>", "</SOLUTION>")],
    [("", "</think>"), "answer"],
    ["think", ("", "")],
    [("", "</think>"), ("", "")],
    ["plan", "think", "answer"],
    ["answer"],
    ["think", ("Answer:", "")],
    [("Plan:", ""), ("Answer:", "")],
]


def texts_in(sections):
    pairs = [(f"<{section}>", f"</{section}>") if isinstance(section, str) else section for section in sections]
    return pairs, [text for pair in pairs for text in pair if text]


def expression_of(pairs, strict):
    """The format as the notebooks would write it: any text in a section, white space between two that are closed."""
    parts = []
    for place, (opening, closing) in enumerate(pairs):
        is_last = place == len(pairs) - 1
        line_break = "\n" if strict else ""
        parts.append(re.escape(opening) + (line_break if opening else ""))
        parts.append(r"[\s\S]*?" if closing or not is_last else r"[\s\S]*")
        parts.append((line_break if closing else "") + re.escape(closing))
        if not is_last:
            parts.append("\n" if strict else r"\s*")
    return re.compile("".join(parts))


@pytest.mark.parametrize("sections", FORMATS, ids=str)
def test_sections(sections):
    pairs, texts = texts_in(sections)
    soft, strict = (factory(sections=sections) for factory in (get_soft_format_reward, get_strict_format_reward))
    once = get_format_reward(sections=sections, score_per_tag=1.0, missing_score=-0.5, exactly_once=True)
    anywhere = get_format_reward(sections=sections, score_per_tag=1.0)
    rng = random.Random(str(sections))
    pieces = [*texts, *(f"\n{text}\n" for text in texts), "x", "\n", " "]
    whole = [["", text, rng.choice(["x", "\n", "", "\nx\n"])] for text in texts]
    seen = set()
    for _ in range(600):
        drawn = rng.choices(pieces, k=rng.randrange(9))
        if rng.random() < 0.7:  # near the format
            drawn = ["x" if pairs[0][0] == "" else ""]
            for _, text, filling in whole:
                drawn += [text, rng.choice([filling, "x", "\n", "\nx\n", ""])]
            drawn[-1] = rng.choice(["", "", drawn[-1]])
        text = "".join(drawn)
        is_soft, is_strict = (expression_of(pairs, s).fullmatch(text) is not None for s in (False, True))
        assert score_of(soft, text) == 0.5 * is_soft, text
        assert score_of(strict, text) == 0.5 * is_strict, text
        assert score_of(once, text) == sum(1.0 if text.count(tag) == 1 else -0.5 for tag in texts)
        assert score_of(anywhere, text) == sum(tag in text for tag in texts)
        seen |= {is_soft, ("strict", is_strict)}
    assert {True, False} <= seen
    assert once.full_marks == anywhere.full_marks == len(texts)


def test_two_sections_are_tags():
    tags = (("<a>", "</b>"), "final")
    for factory in (get_soft_format_reward, get_strict_format_reward, get_format_reward):
        text = "<a>\nr\n</b>\n<final>\n7\n</final>"
        by_tags, by_sections = factory(tags=tags), factory(sections=[["<a>", "</b>"], "final"])
        assert score_of(by_tags, text) == score_of(by_sections, text) == by_sections.full_marks == by_tags.full_marks
        assert pickle.loads(pickle.dumps(by_sections)) == by_sections
        assert hash(by_sections) == hash(factory(sections=(("<a>", "</b>"), "final")))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([], "sections must be a list of tags"),
        ("think", "sections must be a list of tags"),
        (["think", "<answer>"], "sections must be a tag's name without brackets"),
        (["think", ("", " ")], "sections must be a tag's name without brackets"),
        ([("a:", ""), ("", "b:")], "nothing shows where one section ends"),
        (["think", "think"], "'<think>' stands for two places"),
    ],
)
def test_bad_sections_are_refused(sections, message):
    for factory in (get_soft_format_reward, get_strict_format_reward, get_format_reward):
        with pytest.raises(ValueError, match=f"{factory().name}: {message}"):
            factory(sections=sections)


def test_sections_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="give tags or sections, not both"):
        get_soft_format_reward(tags=("think", "answer"), sections=["think"])
    with pytest.raises(ValueError, match="sections have no tags"):
        get_format_reward(sections=[("", "")])


FACTORIES = [
    get_xmlcount_reward,
    get_soft_format_reward,
    get_strict_format_reward,
    get_int_reward,
    get_format_reward,
]


@pytest.mark.parametrize("factory", FACTORIES)
def test_factories_return_picklable_named_callables(factory):
    reward_func = factory(name="mine")
    assert reward_func.__name__ == "mine"
    assert factory().__name__.endswith("_reward_func")
    copy = pickle.loads(pickle.dumps(reward_func))
    assert copy == reward_func
    assert copy.__name__ == "mine"
    texts = [STRICT, LOOSE, ""]
    assert copy(completions=texts) == reward_func(completions=texts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", None, True])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError, match="soft_format_reward_func: score must be a finite number"):
        get_soft_format_reward(score=bad)
    with pytest.raises(ValueError, match="score_per_tag must be a finite number"):
        get_xmlcount_reward(score_per_tag=bad)


@pytest.mark.parametrize("bad", ["", "<answer>", "an swer", None])
def test_bad_tags_are_refused(bad):
    with pytest.raises(ValueError, match="answer_tag must be a tag"):
        get_int_reward(answer_tag=bad)
    with pytest.raises(ValueError, match="tags must be"):
        get_format_reward(tags=("reasoning", bad))
    with pytest.raises(ValueError, match="tags must be two"):
        get_format_reward(tags=("reasoning",))


def test_completions_in_any_form():
    forms = [
        STRICT,
        [{"role": "assistant", "content": STRICT}],
        [{"role": "assistant", "content": [{"type": "text", "text": STRICT}]}],
        None,
        [],
    ]
    assert strict_format_reward_func(completions=forms) == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert strict_format_reward_func(forms) == [0.5, 0.5, 0.5, 0.0, 0.0]  # as the notebooks call it
    assert strict_format_reward_func(completions=[]) == []


def test_nothing_prints(capsys):
    strict_format_reward_func(completions=[STRICT], prompts=["q"], answer=["72"], trainer_state=None)
    assert capsys.readouterr() == ("", "")
