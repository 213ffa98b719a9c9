"""Four conventions of what a right answer is; the harness's two are held against the harness itself."""

import math
import random
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_rewards_hostile_text import COMPLETION, HOSTILE, seconds

from trl_grpo_ext.evaluation import CONVENTIONS, Grade, grade


@pytest.mark.parametrize(
    ("text", "answer", "strict", "staged", "lm_eval_strict", "lm_eval_flexible"),
    [
        ("<answer>\n72\n</answer>", "72", True, True, False, True),
        ("<answer>72.0</answer>", "72", True, True, False, False),
        ("<answer>1080</answer>", "1,080", True, True, False, True),
        ("<answer>72</answer> of 100", "72", True, True, False, False),
        ("<answer>73</answer> 72", "72", False, False, False, True),
        ("<answer>72", "72", False, True, False, True),
        ("<answer></answer> 72", "72", False, True, False, True),
        ("<answer>...</answer> 72", "72", False, True, False, True),
        (r"so \boxed{72} of 100", "72", False, True, False, False),
        (r"\boxed{73} of 72", "72", False, False, False, True),
        ("so\n#### 72\nof 100", "72", False, True, True, False),
        ("#### 72 #### 73", "72", False, False, True, False),
        ("####72", "72", False, True, False, True),
        ("#### $72", "72", False, True, False, True),
        (r"\boxed{72} #### 73", "72", False, True, False, False),
        ("so it is 72.", "72", False, True, False, True),
        ("it is $72.00", "72", False, True, False, False),
        ("it is 72. Really ...", "72", False, True, False, False),
        ("it is \u221272", "-72", False, True, False, False),
        ("#### -72.", "-72", False, True, True, True),
        ("", "72", False, False, False, False),
        (None, "72", False, False, False, False),
        ([{"role": "assistant", "content": "#### 72"}], "72", False, True, True, True),
        ("#### 72", 72, False, True, True, True),
        ("#### 72", 72.0, False, True, True, True),
        ("#### 72", np.int64(72), False, True, True, True),
        ("#### 72", Decimal("72.00"), False, True, True, True),
        ("#### 0.1", np.float32(0.1), False, True, True, True),
        ("#### 3/4", Fraction(3, 4), False, True, False, False),
        ("#### 72", "First 5 + 67.\n#### 72", False, True, True, True),
        (r"<answer>\sqrt{13}</answer>", r"\sqrt{13}", True, True, False, False),
        (r"<answer>13</answer>", r"\sqrt{13}", False, False, False, False),
    ],
)
def test_conventions(text, answer, strict, staged, lm_eval_strict, lm_eval_flexible):
    expected = dict(zip(CONVENTIONS, (strict, staged, lm_eval_strict, lm_eval_flexible), strict=True))
    assert grade(text, answer).correct == expected


def test_what_is_extracted():
    assert grade("<answer> 5 </answer> \\boxed{6}\n#### 7 and 8.00", "5").extracted == {
        "strict": "5",
        "answer": "5",
        "lm_eval_strict": "7",
        "lm_eval_flexible": "8.00",
    }
    assert grade("nothing", "5") == Grade(
        {"strict": None, "answer": None, "lm_eval_strict": "[invalid]", "lm_eval_flexible": "[invalid]"},
        dict.fromkeys(CONVENTIONS, False),
    )


@pytest.mark.parametrize("reference", [None, "", "  ", math.nan, math.inf, ["72"], {"a": 1}])
def test_nothing_to_compare_with(reference):
    with pytest.raises(ValueError, match="the reference is"):
        grade("72", reference)


@given(COMPLETION, st.text(min_size=1) | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_every_completion_is_graded(completion, reference):
    if isinstance(reference, str) and not reference.rpartition("####")[2].partition("\n")[0].strip():
        return
    found = grade(completion, reference)
    assert tuple(found.correct) == tuple(found.extracted) == CONVENTIONS
    assert {type(verdict) for verdict in found.correct.values()} == {bool}


@pytest.mark.parametrize("kind", HOSTILE)
def test_time_grows_linearly(kind):
    """References too: a solution with very many numbers or markers in it."""
    small, large = HOSTILE[kind](50_000), HOSTILE[kind](500_000)
    ratio = seconds(grade, large, "72") / max(seconds(grade, small, "72"), 1e-4)
    assert ratio < 35, f"10 times the text took {ratio:.0f} times as long"


@pytest.mark.parametrize("part", ["#### ", "#### -", "#", "-", "$", "-$", ".", ". ", "####\n", "1.\n", "\0", "#### ,"])
def test_time_grows_linearly_with_the_harness_markers(part):
    small, large = part * (50_000 // len(part)), part * (500_000 // len(part))
    ratio = seconds(grade, large, f"{large}#### 5") / max(seconds(grade, small, f"{small}#### 5"), 1e-4)
    assert ratio < 35, f"10 times the text took {ratio:.0f} times as long"


def test_grading_imports_no_torch():
    code = (
        "import sys\n"
        "from trl_grpo_ext.evaluation import Answer, figures_of, grade\n"
        "grade('#### 5', 5)\n"
        "figures_of([Answer(id=1, completion='5', answer=5)])\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Against the harness


class Harness:
    """The task `gsm8k` of the installed lm-evaluation-harness: its filters and metric, as its own file sets them."""

    def __init__(self):
        from lm_eval.api.registry import get_metric
        from lm_eval.filters import build_filter_ensemble

        (folder,) = util.find_spec("lm_eval").submodule_search_locations
        task = yaml.safe_load((Path(folder) / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
        (metric,) = task["metric_list"]
        self.metric = get_metric(metric["metric"])
        self.options = {k: v for k, v in metric.items() if k not in ("metric", "aggregation", "higher_is_better")}
        self.filters = {}
        for found in task["filter_list"]:
            steps = [
                [step["function"], {k: v for k, v in step.items() if k != "function"} or None]
                for step in found["filter"]
            ]
            self.filters[found["name"]] = build_filter_ensemble(found["name"], steps).filters

    def extract(self, name, texts):
        responses = [[text] for text in texts]
        for make in self.filters[name]:
            responses = make().apply(responses, [{}] * len(texts))
        return list(responses)

    def is_right(self, extracted, reference):
        found = self.metric(predictions=[extracted], references=[reference], **self.options)
        return bool(found["exact_match"])


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra 'dev': pip install '.[dev]'")
    return Harness()


NUMBERS = (
    *("18", "18.", "18.00", "18.0", "$18", "$18.", "$18.00", "-18", "-$18", "$-18", "\u221218", "+18", "18%", "018"),
    *("1,800", "1,800.", "1800", "1,8,0,0", "1.800,00", "18.\n", "18 .", "18..", "..18", ".18", "0.18", "18.5", "5"),
    *("-5.", "- 5", "--5", "5-", "5,", ",5", "$", "$.", ".$", "...", "$,", "-", "-.", ",", "-,", ".", "[invalid]"),
    *("[INVALID]", "\u0661\u0668", "\uff11\uff18", "18\0", "18\0\0", "18.\0", "\0", "1\08", "18\u2028", "18\u00a0"),
    *("eighteen", "", "x", "1e3", "18/2", "1 800", "18 apples", "$18 and $19", "\\$18", "\\boxed{18}"),
)
MARKERS = [
    "#### ",
    "####",
    "####  ",
    "#### \n",
    "##### ",
    "### ",
    "#### #### ",
    "####\t",
    "\n#### ",
    "#### $",
    "#### -",
]
BETWEEN = [" ", "\n", ". ", ".\n", ", ", "", " so ", " = ", "\0", "; ", "...", "\r\n", " Question: "]


def make_text(draw):
    """A completion of up to six pieces, each of them a quirk or plain."""
    kinds = (NUMBERS, MARKERS, BETWEEN)
    pieces = [draw.choice(draw.choices(kinds, (5, 3, 3))[0]) for _ in range(draw.randrange(7))]
    return "".join(pieces) if draw.random() < 0.5 else " ".join(pieces)


def make_reference(draw):
    kind = draw.randrange(6)
    if kind == 0:
        return draw.choice([18, -5, 5, 1800, 18.5, 0.18, 0, 10**20])
    if kind == 1:
        return f"He has <<9+9=18>>{draw.choice(NUMBERS)}.\n{draw.choice(MARKERS)}{draw.choice(NUMBERS)}"
    return f"{draw.choice(['', '', '', '$', '#### '])}{draw.choice(NUMBERS)}{draw.choice(['', '', '', '.', chr(0)])}"


def test_lm_eval_conventions_are_the_harnesses(harness):
    draw = random.Random(0)
    pairs = [(make_text(draw), make_reference(draw)) for _ in range(12_000)]
    # those made at random are mostly wrong: as many whose reference is near what the text ends with
    pairs += [
        (f"{make_text(draw)}{draw.choice(MARKERS)}{number}{draw.choice(['', '.', ' ', chr(0)])}", reference)
        for number in NUMBERS
        for reference in NUMBERS
    ]
    pairs = [(text, reference) for text, reference in pairs if not isinstance(reference, str) or can_grade(reference)]
    assert len(set(map(repr, pairs))) > 6000
    ours = [grade(text, reference) for text, reference in pairs]
    for convention, name in (("lm_eval_strict", "strict-match"), ("lm_eval_flexible", "flexible-extract")):
        theirs = harness.extract(name, [text for text, _ in pairs])
        verdicts = [
            harness.is_right(extracted, str(reference))
            for extracted, (_, reference) in zip(theirs, pairs, strict=True)
        ]
        assert [found.extracted[convention] for found in ours] == theirs
        wrong = [
            (pair, extracted)
            for pair, extracted, found, verdict in zip(pairs, theirs, ours, verdicts, strict=True)
            if found.correct[convention] != verdict
        ]
        assert not wrong
        assert 100 < sum(verdicts) < len(verdicts) - 100


def can_grade(reference):
    try:
        grade("", reference)
    except ValueError:
        return False
    return True


@given(
    st.text(alphabet="0123456789#$.,- \n\0aA[]invalid", max_size=30), st.text(alphabet="018#$., -\n\0A", max_size=12)
)
def test_lm_eval_conventions_on_any_text(harness, text, reference):
    if not can_grade(reference):
        return
    found = grade(text, reference)
    for convention, name in (("lm_eval_strict", "strict-match"), ("lm_eval_flexible", "flexible-extract")):
        (extracted,) = harness.extract(name, [text])
        assert found.extracted[convention] == extracted
        assert found.correct[convention] == harness.is_right(extracted, reference)
