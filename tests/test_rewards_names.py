import sys

import pytest

from trl_grpo_ext.rewards import (
    RewardBundle,
    correctness_reward_func,
    format_reward_func,
    gsm8k_bundle,
    tag_bundle,
)
from trl_grpo_ext.rewards.names import find_rewards


MODULE = """
from trl_grpo_ext.rewards import RewardBundle, correctness_reward_func, tag_bundle

NUMBER = 5
weighted = tag_bundle().with_weights(format_reward_func=0.5)
rewards = [correctness_reward_func]

def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def anything(**kwargs):
    return [0.0 for _ in kwargs["completions"]]

def make(scale=2.0):
    return weighted.with_weights(correctness_reward_func=scale)

def make_one():
    return length

def make_what(needed):
    return weighted
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module in the working folder, which is not among those that Python looks through."""
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    (tmp_path / "broken_of_mine.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("rewards_of_mine", "broken_of_mine"):
        sys.modules.pop(name, None)


def test_bundles_and_rewards_by_name():
    assert find_rewards("gsm8k") == find_rewards(["gsm8k"]) == gsm8k_bundle()
    assert find_rewards("tag") == find_rewards("trl_grpo_ext.rewards.tag_bundle") == tag_bundle()
    assert find_rewards("notebooks") == gsm8k_bundle(as_in_notebooks=True)
    both = find_rewards(["trl_grpo_ext.rewards.format_reward_func", "trl_grpo_ext.rewards.correctness_reward_func"])
    assert list(both) == [format_reward_func, correctness_reward_func]
    assert find_rewards([]) == RewardBundle()


def test_rewards_of_trl():
    bundle = find_rewards(["think_format_reward", "accuracy_reward", "get_soft_overlong_punishment"])
    assert bundle.names == ["think_format_reward", "accuracy_reward", "soft_overlong_punishment_reward"]
    # as `trl grpo` sets it: longer than 1280 - 256 tokens costs something, longer than 1280 all
    lengths = [1024, 1200, 1280, 1281]
    assert bundle[2](completion_ids=[[0] * length for length in lengths]) == [0.0, -176 / 256, -1.0, -1.0]


def test_rewards_of_somebodys_own():
    weighted = find_rewards("rewards_of_mine.weighted")
    assert weighted.weights == [1.0, 0.5]
    assert find_rewards("rewards_of_mine.make").weights == [2.0, 0.5]
    assert find_rewards("rewards_of_mine.rewards").names == ["correctness_reward_func"]
    assert find_rewards("rewards_of_mine.length")[0](completions=["abc"]) == [3.0]
    assert find_rewards("rewards_of_mine.make_one").names == ["length"]
    assert find_rewards("rewards_of_mine.anything").names == ["anything"]
    mixed = find_rewards(["rewards_of_mine.length", "rewards_of_mine.weighted"])
    assert mixed.weights == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gms8k", "did you mean gsm8k?"),
        ("acuracy_reward", "did you mean accuracy_reward?"),
        ("nothing-like-it", "They are gsm8k, hardened, math, notebooks, tag, accuracy_reward"),
        ("rewards_of_mine.lenght", "rewards_of_mine has no 'lenght': did you mean length?"),
        ("no_such_module.reward", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("broken_of_mine.reward", "No module named 'no_such_package'"),
        ("rewards_of_mine.NUMBER", "it is a int, which is no reward"),
        ("trl_grpo_ext.rewards.RewardBundle", "RewardBundle is a class and no reward"),
        ("..", "cannot be imported"),
    ],
)
def test_what_is_not_found_is_one_line(name, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        find_rewards(["tag", name])
    assert str(error.value).startswith(name)
    assert message in str(error.value)


def test_two_rewards_of_one_name():
    with pytest.raises(ValueError, match="two rewards of this bundle are called 'correctness_reward_func'"):
        find_rewards(["gsm8k", "tag"])
