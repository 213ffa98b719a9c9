import copy
import functools
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trl_grpo_ext.config import GRPOExtConfig
from trl_grpo_ext.rewards import (
    RewardBundle,
    correctness_reward_func,
    format_reward_func,
    get_correctness_reward,
    get_int_reward,
    gsm8k_bundle,
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    tag_bundle,
    xmlcount_reward_func,
)
from trl_grpo_ext.tasks import format_solution
from trl_grpo_ext.trainer import check_rewards


GSM8K_NAMES = [
    "xmlcount_reward_func",
    "soft_format_reward_func",
    "strict_format_reward_func",
    "int_reward_func",
    "correctness_reward_func",
]


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def test_ready_made_bundles():
    assert gsm8k_bundle().names == GSM8K_NAMES
    assert gsm8k_bundle().weights == [1.0] * 5
    assert tag_bundle().names == ["correctness_reward_func", "format_reward_func"]
    assert [reward_func.__name__ for reward_func in gsm8k_bundle()] == GSM8K_NAMES
    assert isinstance(gsm8k_bundle(), list)
    assert len(gsm8k_bundle()) == 5


def total(bundle, text, answer):
    return sum(reward_func(completions=[text], answer=[answer])[0] for reward_func in bundle)


def test_no_reward_depends_on_the_length_of_a_right_answer():
    """So that a group of right answers has no spread, and a long right answer never scores like a short wrong one."""
    lengths = (1, 200, 2_000, 20_000)
    scores = {total(gsm8k_bundle(), format_solution("x" * length, "72"), "72") for length in lengths}
    assert scores == {4.0}
    assert total(gsm8k_bundle(), format_solution("x", "7"), "72") == 2.0


PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "72", "x", "\n</answer>", "\n<answer>\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example(format_solution("r", "72"))
@example("<reasoning>r</reasoning><answer>72</answer>")
@example(format_solution("r", "72") + "\nand more")
def test_a_line_break_at_the_end_changes_no_score(text):
    text = text.rstrip("\n")
    for reward_func in gsm8k_bundle():
        without, with_line_break = reward_func(completions=[text, f"{text}\n"], answer=["72", "72"])
        assert without == with_line_break, reward_func.__name__


def test_text_after_the_answer_costs():
    text = format_solution("r", "72")
    assert total(gsm8k_bundle(), f"{text}\nmore", "72") < total(gsm8k_bundle(), f"{text}\n", "72") == 4.0


def test_the_notebooks_functions_keep_their_names_and_scores():
    bundle = gsm8k_bundle(as_in_notebooks=True)
    assert bundle.names == GSM8K_NAMES
    assert list(bundle) == [
        xmlcount_reward_func,
        soft_format_reward_func,
        strict_format_reward_func,
        int_reward_func,
        correctness_reward_func,
    ]
    text = format_solution("x" * 100, "72")
    assert xmlcount_reward_func(completions=[text]) == [pytest.approx(0.5 - 0.001 * len(text) + 0.001)]


def test_weights_are_known_to_be_set_or_not():
    bundle = gsm8k_bundle()
    set_to_one = bundle.with_weights(int_reward_func=1.0)
    assert set_to_one == bundle
    for changed in (
        lambda bundle: bundle.copy(),
        lambda bundle: pickle.loads(pickle.dumps(bundle)),
        lambda bundle: bundle + [length_reward],
        lambda bundle: [length_reward] + bundle,
        lambda bundle: bundle[1:],
        lambda bundle: bundle.select("int_reward_func"),
    ):
        assert changed(set_to_one).has_own_weights
        assert not changed(bundle).has_own_weights
    assert RewardBundle(bundle, [1.0] * 5).has_own_weights


def test_what_makes_a_reward_is_no_reward():
    with pytest.raises(TypeError, match=r"gsm8k_bundle is no reward .*, gsm8k_bundle\(\)"):
        RewardBundle(gsm8k_bundle)
    with pytest.raises(TypeError, match=r"get_int_reward\(\)"):
        tag_bundle() + [get_int_reward]
    with pytest.raises(TypeError, match=r"inside a list of rewards: pass `bundle \+"):
        RewardBundle([tag_bundle(), length_reward])


def test_with_weights():
    bundle = gsm8k_bundle()
    weighted = bundle.with_weights(correctness_reward_func=4.0, int_reward_func=0)
    assert weighted.weights == [1.0, 1.0, 1.0, 0.0, 4.0]
    assert bundle.weights == [1.0] * 5
    assert weighted.with_weights(int_reward_func=2).weights == [1.0, 1.0, 1.0, 2.0, 4.0]
    assert list(weighted) == list(bundle)
    assert weighted != bundle
    assert weighted.with_weights(correctness_reward_func=1, int_reward_func=1) == bundle


def test_select():
    bundle = gsm8k_bundle().with_weights(correctness_reward_func=4.0)
    selected = bundle.select("correctness_reward_func", "int_reward_func")
    assert list(selected) == [correctness_reward_func, get_int_reward(signs_and_commas=True)]
    assert selected.weights == [4.0, 1.0]
    assert selected.has_own_weights
    assert not gsm8k_bundle()[3:].has_own_weights
    assert bundle[3:].names == ["int_reward_func", "correctness_reward_func"]
    assert bundle[3:].weights == [1.0, 4.0]


def test_unknown_names_raise_with_the_nearest():
    with pytest.raises(ValueError, match="'corectness_reward', did you mean 'correctness_reward_func'"):
        gsm8k_bundle().with_weights(corectness_reward=1.0)
    with pytest.raises(ValueError, match="'int_reward', did you mean 'int_reward_func'"):
        gsm8k_bundle().select("int_reward")
    with pytest.raises(ValueError, match="no reward is called 'x'"):
        RewardBundle().select("x")


def test_addition():
    bundle = tag_bundle().with_weights(format_reward_func=0.5)
    both = bundle + [length_reward]
    assert both.names == ["correctness_reward_func", "format_reward_func", "length_reward"]
    assert both.weights == [1.0, 0.5, 1.0]
    assert ([length_reward] + bundle).weights == [1.0, 1.0, 0.5]
    assert (bundle + RewardBundle([length_reward], [3.0])).weights == [1.0, 0.5, 3.0]
    with_model = (bundle + ["some/reward-model"]).with_weights({"reward-model": 0.25}, correctness_reward_func=2)
    assert with_model.names[-1] == "reward-model"
    assert with_model[-1] == "some/reward-model"
    assert with_model.weights == [2.0, 0.5, 0.25]
    bundle += [length_reward]
    assert bundle == both
    with pytest.raises(TypeError):
        bundle + length_reward


def test_names_are_those_that_trl_logs():
    class Judge:
        def __call__(self, completions, **kwargs):
            return [0.0] * len(completions)

    bundle = RewardBundle([functools.partial(length_reward, scale=2), Judge(), get_correctness_reward(name="mine")])
    assert bundle.names == ["length_reward", "Judge", "mine"]


@pytest.mark.parametrize(
    ("reward_funcs", "weights", "error", "message"),
    [
        ([int_reward_func, int_reward_func], None, ValueError, "two rewards of this bundle are called"),
        ([int_reward_func], [1.0, 2.0], ValueError, "got 2 for 1 rewards"),
        ([int_reward_func], [float("nan")], ValueError, "must be a finite number, got nan"),
        ([int_reward_func], ["1"], ValueError, "must be a finite number, got '1'"),
        ([int_reward_func], [True], ValueError, "must be a finite number, got True"),
        ([3], None, TypeError, "a reward must be a function, a model or a model's id, got 3"),
        ([""], None, TypeError, "got ''"),
        ("some/reward-model", None, TypeError, "must be a list of reward functions"),
        (int_reward_func, None, TypeError, "must be a list of reward functions"),
    ],
)
def test_bad_bundles_are_refused(reward_funcs, weights, error, message):
    with pytest.raises(error, match=message):
        RewardBundle(reward_funcs, weights)


CHANGES = {
    "append": lambda bundle: bundle.append(length_reward),
    "extend": lambda bundle: bundle.extend([length_reward]),
    "insert": lambda bundle: bundle.insert(0, length_reward),
    "pop": lambda bundle: bundle.pop(),
    "remove": lambda bundle: bundle.remove(int_reward_func),
    "clear": lambda bundle: bundle.clear(),
    "sort": lambda bundle: bundle.sort(key=str),
    "reverse": lambda bundle: bundle.reverse(),
    "set": lambda bundle: bundle.__setitem__(0, length_reward),
    "set slice": lambda bundle: bundle.__setitem__(slice(0, 1), [length_reward]),
    "delete": lambda bundle: bundle.__delitem__(0),
    "multiply": lambda bundle: bundle.__imul__(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_bundle_does_not_change(change):
    bundle = gsm8k_bundle()
    with pytest.raises(TypeError, match="a RewardBundle does not change"):
        CHANGES[change](bundle)
    assert bundle == gsm8k_bundle()
    assert list(bundle) == list(gsm8k_bundle())


def test_what_a_bundle_returns_can_be_changed_without_changing_it():
    bundle = gsm8k_bundle()
    bundle.weights.append(7.0)
    bundle.names.clear()
    plain = list(bundle)
    plain.append(length_reward)
    assert bundle.weights == [1.0] * 5
    assert bundle.names == GSM8K_NAMES
    assert len(bundle) == 5


def test_copies_and_pickles():
    bundle = (gsm8k_bundle() + ["some/reward-model"]).with_weights(correctness_reward_func=4.0)
    for other in (copy.copy(bundle), copy.deepcopy(bundle), bundle.copy(), pickle.loads(pickle.dumps(bundle))):
        assert type(other) is RewardBundle
        assert other == bundle
        assert other.weights == bundle.weights
        assert other.names == bundle.names
    assert repr(tag_bundle()) == "RewardBundle(correctness_reward_func=1, format_reward_func=1)"


def test_a_bundle_in_a_plain_list_pipeline():
    scores = {}
    for reward_func, weight in zip(tag_bundle(), tag_bundle().weights, strict=True):
        scores[reward_func.__name__] = [
            weight * x for x in reward_func(completions=["<answer>7</answer>"], answer=["7"])
        ]
    assert scores == {"correctness_reward_func": [2.0], "format_reward_func": [0.4]}
    assert format_reward_func in tag_bundle()


@pytest.mark.parametrize("rewards", [5, {correctness_reward_func}, {}, (r for r in ()), RewardBundle])
def test_what_is_no_list_of_rewards(rewards):
    with pytest.raises(TypeError, match=r"reward_funcs must be|is a class and no reward"):
        check_rewards(rewards, GRPOExtConfig("out", use_cpu=True, bf16=False), {})
