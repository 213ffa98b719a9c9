"""What rewards may be given: completions, references and options of every kind, as hypothesis draws them."""

import decimal
import fractions
import inspect

import numpy
from hypothesis import strategies as st

from trl_grpo_ext import rewards
from trl_grpo_ext.rewards import ANSWER_EXTRACTORS


PARTS = (
    *("<reasoning>", "</reasoning>", "<answer>", "</answer>", "<think>", "</think>", "<SOLUTION>", "</SOLUTION>"),
    *(
        "<start_working_out>",
        "<end_working_out>",
        "####",
        "...",
        "\n",
        " ",
        "```",
        "\\boxed{",
        "\\frac{1}{",
        "\\frac12",
    ),
    *(
        "{",
        "}",
        "$",
        "\\(",
        "\\)",
        "\\text{",
        "\\pi",
        "\\sqrt{",
        "^",
        "_",
        "=",
        "!",
        "%",
        "1",
        "2",
        "0",
        "12",
        "000",
        ",",
    ),
    *(
        ".",
        "-",
        "+",
        "/",
        "e",
        "x",
        "\N{MINUS SIGN}",
        "\N{EN DASH}",
        "\N{NO-BREAK SPACE}",
        "minus ",
        "not ",
        "thousand",
    ),
    *(
        "\0",
        "\ud800",
        "\N{RIGHT-TO-LEFT OVERRIDE}",
        "\N{COMBINING ACUTE ACCENT}",
        "\N{ARABIC-INDIC DIGIT FIVE}",
        "\u4e07",
    ),
)
TEXT = st.text() | st.lists(st.sampled_from(PARTS), max_size=40).map("".join)
PART = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image", 5])}, optional={"text": TEXT | st.none()}),
    st.none() | st.integers() | TEXT,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["assistant", "user", "tool", "system", None, 5]),
        "content": TEXT | st.none() | st.integers() | st.lists(PART, max_size=3),
        "tool_calls": st.none() | st.lists(st.dictionaries(st.just("function"), TEXT), max_size=1),
    },
)
COMPLETION = TEXT | st.none() | st.lists(MESSAGE | st.none(), max_size=3) | MESSAGE
REFERENCE = st.one_of(
    TEXT,
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.none() | st.booleans(),
    st.builds(decimal.Decimal, st.sampled_from(["NaN", "Infinity", "1E+100000", "-0.10"])),
    st.fractions(),
    st.sampled_from([numpy.float32(0.1), numpy.int64(5), numpy.array(7), numpy.array([1, 2]), [1], {}, 10**5000]),
    st.just(fractions.Fraction(1, 3)),
)


def fails(text):
    raise KeyError(text[:10])


SCORE = st.sampled_from([-1.0, 0.0, 0.25, 2, 1e6])
NAMES = st.sampled_from(["reasoning", "answer", "think", "SOLUTION"])
PAIR = st.sampled_from([("<SOLUTION>", "</SOLUTION>"), ("<start_working_out>", "<end_working_out>")])
TAGS = (
    st.lists(NAMES | PAIR, min_size=2, max_size=2, unique_by=str)
    .filter(lambda tags: not ({"SOLUTION", ("<SOLUTION>", "</SOLUTION>")} <= set(tags)))
    .map(tuple)
)
EXTRACTOR = st.sampled_from([*ANSWER_EXTRACTORS, ("think", "boxed"), ["tag", "last_number"], str.lower, len, fails])
# For each option of the factories, by its name; one that is not here fails the test that asks for it.
OPTIONS = {
    "answer_column": st.just("answer"),
    "answer_extractor": EXTRACTOR,
    "answer_tag": NAMES | PAIR,
    "exact_score": SCORE,
    "exactly_once": st.booleans(),
    "final_newline": st.booleans(),
    "final_newline_penalty": st.booleans(),
    "hardened": st.booleans(),
    "max_answer_chars": st.sampled_from([1, 128, 10**6]),
    "max_chars": st.sampled_from([1, 8192, 10**6]),
    "min_reasoning_chars": st.sampled_from([1, 4]),
    "missing_score": SCORE,
    "name": st.just("a_name"),
    "numeric": st.sampled_from(["safe", "seed"]),
    "numeric_score": SCORE,
    "penalty_per_char": SCORE,
    "score": SCORE,
    "score_per_tag": SCORE,
    "sections": st.none()
    | st.sampled_from(
        [
            ["think", ("", "")],
            [("", "</think>"), "answer"],
            [("<start_working_out>", "<end_working_out>"), "SOLUTION"],
            ["plan", "reasoning", "answer"],
        ]
    ),
    "signs_and_commas": st.booleans(),
    "tags": TAGS,
    "wrong_score": SCORE,
    # the worker processes have tests of their own
    "as_in_notebooks": st.just(False),
    "symbolic": st.just(False),
}
# Made of what only a worker process can be asked.
WITH_WORKERS = ("get_math_correctness_reward", "math_bundle")
FACTORIES = {
    name: getattr(rewards, name)
    for name in rewards.__all__
    if (name.endswith("_bundle") or (name.startswith("get_") and name.endswith("_reward")))
    and name not in WITH_WORKERS
}


@st.composite
def made_rewards(draw, name):
    """The rewards that a factory makes of some of its options."""
    factory = FACTORIES[name]
    options = {
        option: draw(OPTIONS[option]) for option in inspect.signature(factory).parameters if draw(st.booleans())
    }
    if options.get("sections"):  # in the place of tags
        options.pop("tags", None)
    made = factory(**options)
    return list(made) if isinstance(made, list) else [made]
