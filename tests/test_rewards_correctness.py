import pickle
from fractions import Fraction

import oracle
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from trl_grpo_ext.evaluation import grade
from trl_grpo_ext.rewards import (
    correctness_reward_func,
    exact_correctness_reward_func,
    get_correctness_reward,
    get_exact_correctness_reward,
    numerically_equal,
    parse_answer_number,
    parse_number,
    parse_plain_number,
)


MINUS = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("072", 72),
        ("-72", -72),
        (f"{MINUS}72", -72),
        ("+72", 72),
        ("- 72", 72),  # a dash in a list, not a sign
        ("1,080", 1080),
        ("1,575,000", 1575000),
        ("1,080.50", Fraction("1080.5")),
        ("-1,080", -1080),
        ("$29.00", 29),
        ("$ 29", 29),
        ("-$5", -5),
        ("$-5", -5),
        (f"{MINUS}$5", -5),
        ("-$-5", 5),
        (r"\$5", 5),
        ("€5", 5),
        ("5 €", 5),
        ("£5", 5),
        ("¥500", 500),
        ("₹1,000", 1000),
        ("50%", 50),
        (r"50\%", 50),
        ("0.5", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("72.", 72),
        ("0.10", Fraction(1, 10)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("3/4.", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\dfrac{3}{4}", Fraction(3, 4)),
        (r"\boxed{72}", 72),
        (r"$\boxed{\frac{3}{4}}$", Fraction(3, 4)),
        ("72 apples", 72),
        ("She has 72 apples left.", 72),
        ("72km/h", 72),
        ("**72**", 72),
        ("1.5e3", 1500),
        ("2E-2", Fraction(1, 50)),
        ("٣", 3),
        (72, 72),
        (0.5, Fraction(1, 2)),
        # not one number
        ("", None),
        ("no number", None),
        ("3 4", None),
        ("3 and 4", None),
        ("1 080", None),
        ("2 3/4", None),
        ("1,08", None),
        ("1,080,00", None),
        ("1,0800", None),
        ("1.2.3", None),
        ("3/4/2020", None),
        ("3/4.5", None),
        ("10-7", None),
        ("3:30", None),
        ("2^10", None),
        ("3/0", None),
        (r"\frac{3}{0}", None),
        ("1e1001", None),
        ("1e-1001", None),
        ("1e999999999999999999999", None),
        ("9" * 1001, None),
        (None, None),
        (float("nan"), None),
        (float("inf"), None),
        (["72"], None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("24.0", "24", True),
        ("$29.00", "29", True),
        ("1,000", "1000", True),
        ("0.75", r"\frac{3}{4}", True),
        ("50%", "50", True),
        ("50%", "0.5", False),
        (f"{MINUS}5", "-5", True),
        (f"{MINUS}5", "5", False),
        ("-$5", "5", False),
        ("0.1", "0.1000000000000000000001", False),
        ("0.3333333333333333", "1/3", False),
        ("9007199254740993", "9007199254740992", False),  # the same float
        ("-0", "0", True),
        ("72", "73", False),
        ("72", "72 of 100", False),
        ("", "", False),
        ("x", "x", False),
        (None, None, False),
    ],
)
def test_numerically_equal(a, b, equal):
    assert numerically_equal(a, b) is equal
    assert numerically_equal(b, a) is equal


@pytest.mark.parametrize(
    ("reference", "number"),
    [
        ("72", 72),
        (" -72\n", -72),
        (f"{MINUS}72", -72),
        ("1,080.50", Fraction("1080.5")),
        ("$5", 5),
        ("-$5", -5),
        ("5 €", 5),
        ("50%", 50),
        (r"50 \%", 50),
        ("72.", 72),
        (".5", Fraction(1, 2)),
        ("1.5e3", 1500),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\boxed{72}", 72),
        (r"$\boxed{\frac{3}{4}}$", Fraction(3, 4)),
        (r"\( 72 \)", 72),
        # numbers are in there, and it is something else
        (r"\sqrt{13}", None),
        (r"\frac56", Fraction(5, 6)),
        (r"(2,\infty)", None),
        ("2^{10}", None),
        ("x=5", None),
        ("5x", None),
        ("72 apples", None),
        ("2 3/4", Fraction(11, 4)),
        ("3:30", None),
        ("10-7", None),
        ("1,2", None),
        ("5!", None),
        (r"\boxed{1}+\boxed{2}", None),
        ("", None),
        ("blue", None),
    ],
)
def test_parse_plain_number(reference, number):
    assert parse_plain_number(reference) == number


@pytest.mark.parametrize(
    ("reference", "wrong"),
    [(r"\sqrt{13}", "13"), (r"\frac56", "56"), (r"(2,\infty)", "2"), ("x=5", "5"), ("2^{10}", "10")],
)
def test_a_number_inside_a_reference_is_not_the_reference(reference, wrong):
    """13 is not the answer where the reference is a root of 13; the root, as the reference writes it, is."""
    texts = [tagged(wrong), tagged(reference), tagged(f"{wrong} apples")]
    assert correctness_reward_func(completions=texts, answer=[reference] * 3) == [0.0, 2.0, 0.0]


NUMBER_LIKE = st.text(alphabet="0123456789.-+,/$%eE ax\\{}\u2212\u20ac\n", max_size=12) | st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "$", "= ", "about ", "(", "x-", "--", "."]),
    st.integers(-999, 999) | st.decimals(-99, 99, places=2),
    st.sampled_from(["", ".", "%", " apples", ")", "-", "kg", ".."]),
)


@given(NUMBER_LIKE, NUMBER_LIKE)
@example("x-5", "--5")
@example("5..", ".5e")
def test_accepts_what_the_notebooks_rule_accepts(a, b):
    for text in (a, b):
        # the one exception: a minus that the rule overlooks, see `numerically_equal`
        assume("\u2212" not in text and "-$" not in text and "-\\$" not in text and "-\u20ac" not in text)
    left, right = oracle.simple_number(a), oracle.simple_number(b)
    if left is not None and left == right:
        assert numerically_equal(a, b)


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "${:,}", "{}.0", "{:,}.00", "{} apples", "{}%"]))
def test_a_written_number_is_that_number(number, form):
    assert parse_number(form.format(number)) == number
    assert numerically_equal(form.format(number), str(number))
    assert not numerically_equal(form.format(number), str(number + 1))


def tagged(answer):
    return f"<reasoning>\nr\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.mark.parametrize(
    ("text", "answer", "score", "exact_score"),
    [
        (tagged("72"), "72", 2.0, 2.0),
        (tagged("1,080"), "1,080", 2.0, 2.0),
        (tagged("1080"), "1,080", 1.5, 0.0),
        (tagged("$72.00"), "72", 1.5, 0.0),
        (tagged("72 apples"), "72", 1.5, 0.0),
        (tagged("73"), "72", 0.0, 0.0),
        (tagged("72 or 73"), "72", 0.0, 0.0),
        (tagged(""), "72", 0.0, 0.0),
        (tagged("..."), "...", 0.0, 2.0),
        ("72", "72", 0.0, 2.0),
        ("<answer>72", "72", 0.0, 2.0),
        ("<answer>72</answer><answer>73</answer>", "72", 0.0, 0.0),
        ("<answer>blue</answer>", "blue", 2.0, 2.0),
        ("<answer>blue</answer>", "Blue", 0.0, 0.0),
        ("", "72", 0.0, 0.0),
        (None, "72", 0.0, 0.0),
        (tagged("72"), 72, 2.0, 2.0),
        (tagged("72"), 72.0, 2.0, 2.0),
        (tagged("72.0"), 72.0, 1.5, 0.0),
        (tagged("72"), " 72\n", 2.0, 2.0),
        (tagged("72"), "He has 70 + 2 = <<70+2=72>>72.\n#### 72", 2.0, 2.0),
        (tagged("72"), "#### 72", 2.0, 2.0),
        (tagged("1080"), "####1,080", 1.5, 0.0),
        (tagged("73"), "#### 72", 0.0, 0.0),
        (tagged("72 apples"), r"\boxed{72}", 1.5, 0.0),
        # nothing to compare with: not scored
        (tagged("72"), "#### ", None, None),
        (tagged("72"), ["72"], None, None),
        (tagged("72"), None, None, None),
        (tagged("72"), float("nan"), None, None),
        (tagged("72"), "", None, None),
    ],
)
def test_correctness(text, answer, score, exact_score):
    columns = {"prompts": ["q"], "completions": [text], "answer": [answer]}
    assert correctness_reward_func(**columns) == [score]
    assert exact_correctness_reward_func(**columns) == [exact_score]


def test_options():
    texts = [tagged("72"), tagged("72.0"), tagged("73")]
    answers = ["72"] * 3
    reward_func = get_correctness_reward(exact_score=1.0, numeric_score=0.5, wrong_score=-1.0)
    assert reward_func(completions=texts, answer=answers) == [1.0, 0.5, -1.0]
    reward_func = get_exact_correctness_reward(score=1.0, wrong_score=-1.0)
    assert reward_func(completions=texts, answer=answers) == [1.0, -1.0, -1.0]
    for get_reward in (get_correctness_reward, get_exact_correctness_reward):
        reward_func = get_reward(answer_tag="final", answer_column="target")
        assert reward_func(completions=["<final>72</final>"], target=["72"], answer=["9"]) == [2.0]
        copy = pickle.loads(pickle.dumps(get_reward(name="mine")))
        assert copy.__name__ == "mine"
        assert copy(completions=texts[:1], answer=["72"]) == [2.0]


def test_as_the_notebooks_call_it():
    assert correctness_reward_func(["q"], [[{"role": "assistant", "content": tagged("72")}]], ["72"]) == [2.0]


class Log:
    """What TRL passes as `log_extra` and `log_metric`."""

    def __init__(self):
        self.extra = {}
        self.metrics = {}

    def columns(self):
        return {"log_extra": self.extra.__setitem__, "log_metric": self.metrics.__setitem__, "trainer_state": None}


def test_logs_answers_and_accuracy(capsys):
    log = Log()
    texts = [tagged("72"), tagged("72.0"), tagged("73"), "none", tagged("5")]
    answers = ["72", "72", "72", "72", None]
    rewards = correctness_reward_func(completions=texts, answer=answers, **log.columns())
    assert rewards == [2.0, 1.5, 0.0, 0.0, None]
    assert log.extra == {"extracted_answer": ["72", "72.0", "73", None, "5"]}
    assert log.metrics == {"accuracy": 0.5}  # of the four that were scored
    exact_correctness_reward_func(completions=texts, answer=answers, **log.columns())
    assert log.extra["exact_correctness/extracted_answer"] == ["72", "72.0", "73", "none", "5"]
    assert log.metrics["exact_correctness/accuracy"] == 0.25
    assert capsys.readouterr() == ("", "")


def test_no_accuracy_where_nothing_was_scored():
    log = Log()
    assert correctness_reward_func(completions=["x"], answer=[None], **log.columns()) == [None]
    assert log.metrics == {}


def test_wrong_columns_are_told():
    with pytest.raises(ValueError, match=r"needs the dataset column 'answer' and was given \['question'\]"):
        correctness_reward_func(completions=["x"], question=["q"])
    with pytest.raises(ValueError, match="needs the dataset column 'target'"):
        get_correctness_reward(answer_column="target")(completions=["x"], answer=["q"])
    with pytest.raises(ValueError, match="2 completions but 1 values of 'answer'"):
        correctness_reward_func(completions=["x", "y"], answer=["1"])
    with pytest.raises(ValueError, match="must be a list, not a string"):
        correctness_reward_func(completions=["x", "y"], answer="12")
    with pytest.raises(ValueError, match="completions is missing"):
        correctness_reward_func(answer=["1"])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="numeric_score must be a finite number"):
        get_correctness_reward(numeric_score=float("nan"))
    with pytest.raises(ValueError, match="answer_column must be a column's name"):
        get_correctness_reward(answer_column="")
    with pytest.raises(ValueError, match="name must be a non-empty string"):
        get_exact_correctness_reward(name="")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("13", r"\sqrt{13}"),
        ("13", "sqrt(13)"),
        ("13", "\N{SQUARE ROOT}13"),
        ("56", r"\frac56"),
        *[
            ("5", answer)
            for answer in (
                *(
                    "5!",
                    "5x",
                    "5 x",
                    "x5",
                    "x^5",
                    "x_5",
                    r"5\pi",
                    "5\N{GREEK SMALL LETTER PI}",
                    "5\N{SUPERSCRIPT TWO}",
                ),
                *(
                    r"(5,\infty)",
                    "(5, \N{INFINITY})",
                    "5/x",
                    "x/5",
                    "5 + x",
                    "x - 5",
                    "5*x",
                    "> 5",
                    "|5|",
                    "f(5)",
                    "x-5",
                ),
                *(
                    r"\boxed{5\pi}",
                    "5 million",
                    r"\frac{5}{x}",
                    "5**x",
                    "5xy",
                    "minus 5",
                    "{x | 5}",
                    "5\N{DIVISION SIGN}x",
                ),
            )
        ],
    ],
)
def test_mathematics_around_a_number_is_not_the_number(reference, answer):
    assert correctness_reward_func(completions=[tagged(answer)], answer=[reference]) == [0.0]
    assert not grade(tagged(answer), reference).correct["strict"]


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "5.0",
            "= 5",
            "x = 5",
            "$x = 5$",
            "5%",
            "$5",
            "5 $",
            r"\$5",
            "\N{EURO SIGN}5",
            "5.",
            "5 apples",
            "5 m",
            "5km/h",
        ),
        *("She has 5 apples left, not more!", "**5**", "*5*", r"\boxed{5}", r"$\boxed{5}$", r"\(5\)", r"5\text{ cm}"),
        *(
            r"5^\circ",
            r"\boxed{5\%}",
            r"\text{It is } 5",
            "5-inch",
            "$5/hour",
            "5 (apples)",
            "about 5",
            "5 more than Tim",
            "5 quarters",
            "5 fifth graders",
            "2 + 3 = 5",
            "so 10/2 = 2 + 3 = 5 apples",
            "x=5,",
            "**Answer = 5**",
            "5\u500b",
            "I have 5",
        ),
        *("Answer: 5", "the answer is 5 km", "`5`", "5 L", "a 5", "#5", r"5\ \mathrm{kg}"),
    ],
)
def test_words_and_units_around_a_number(answer):
    assert correctness_reward_func(completions=[tagged(answer)], answer=["5"]) == [1.5]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        *((text, 12) for text in ("5 + 7 = 12", "x = 12", "10 + 2 = 6 * 2 = 12", "1,000 - 988 = 12")),
        ("7 = 7 = 12", 12),
        ("total = 12 apples", 12),
        ("3 1/2", Fraction(7, 2)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        (r"-3\frac12", Fraction(-7, 2)),
        ("12 1/2 miles", Fraction(25, 2)),
        *((text, 1000) for text in ("1 000", "1\u202f000", "1\u00a0000", r"1\,000", "1{,}000", "1,000", "1000 km")),
        ("1 000 000 people", 1_000_000),
        ("1,00,000", 100_000),
        ("12,34,567", 1_234_567),
        *(
            (text, -5)
            for text in ("minus 5", "Negative 5", "\u20135", "\u22125", "\u20105", "-$5", "the result is -5")
        ),
        *(
            (text, None)
            for text in (
                *(
                    "12 thousand",
                    "12k",
                    "12 k",
                    "12K",
                    "12M",
                    "12 dozen",
                    "12 Dozen",
                    "12 hundred",
                    "12 lakh",
                    "12\u4e07",
                ),
                *(r"12\pi", "12 pi", "12\u03c0", "12^2", "12\u00b2", "12 squared", "12!", "12x", "12 x", r"\sqrt{12}"),
                *(
                    "not 12",
                    "isn't 12",
                    "never 12",
                    "12 or thirteen",
                    "either 12",
                    "12 or 13",
                    "between 12",
                    "12 is wrong",
                ),
                *(
                    "at least 12",
                    "more than 12",
                    "less than 12",
                    "> 12",
                    "\u2265 12",
                    "12+",
                    "\u00b112",
                    "~12",
                    r"\ne 12",
                ),
                *(
                    "half of 12",
                    "twice 12",
                    "12 and a half",
                    "12 and a third",
                    "12 thirds",
                    "square of 12",
                    "out of 12",
                ),
                *("- 12", "total - 12", "total*12", "x/12", "3 x 12", "12:30", "12.3.4", "0x12", "1011_2", "(12, 13)"),
                *(
                    "x = 12, y = 5",
                    "x = 5; y = 12",
                    "x != 12",
                    "x >= 12",
                    "x is not = 12",
                    "12 = x",
                    "x = 5 or x = 12",
                ),
                *(
                    "5 000 00",
                    "1 00",
                    "12,5",
                    "12 3",
                    "3/0",
                    "3 1/0",
                    "twelve 12",
                    "12 point five",
                    "\u20145",
                    "\u8d1f5",
                ),
            )
        ),
    ],
)
def test_the_number_that_an_answer_gives(answer, number):
    """What the safe rule makes of it; by the seeds' rule any single number in it is paid, `numeric="seed"`."""
    assert parse_answer_number(answer) == number
    if number is not None and number > 0 and number == int(number):
        assert correctness_reward_func(completions=[tagged(answer)], answer=[str(int(number))]) == [1.5]
    if number is None:
        for reference in ("12", "5"):
            assert correctness_reward_func(completions=[tagged(answer)], answer=[reference]) == [0.0]


def test_the_rule_of_the_seeds():
    seed = get_correctness_reward(numeric="seed")
    for answer in ("12 thousand", "not 12", r"12\pi", "at least 12"):
        assert seed(completions=[tagged(answer)], answer=["12"]) == [1.5]
    assert seed(completions=[tagged("13")], answer=[r"\sqrt{13}"]) == [1.5]
    assert seed(completions=[tagged("5 + 7 = 12")], answer=["12"]) == [0.0]
    with pytest.raises(ValueError, match="numeric"):
        get_correctness_reward(numeric="strict")
