"""Rewards by name, as a command line or a configuration file has them."""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from ..extras import require
from ..spelling import suggestion
from .bundle import RewardBundle, gsm8k_bundle, math_bundle, tag_bundle


BUNDLES: dict[str, Callable[[], RewardBundle]] = {
    "gsm8k": gsm8k_bundle,
    "hardened": partial(gsm8k_bundle, hardened=True),
    "math": math_bundle,
    "notebooks": partial(gsm8k_bundle, as_in_notebooks=True),
    "tag": tag_bundle,
}
# What `trl grpo` calls by a short name; and if that makes a reward, with which arguments. They import torch, so
# they are imported when they are asked for.
TRL_REWARDS: dict[str, dict[str, Any] | None] = {
    "accuracy_reward": None,
    "reasoning_accuracy_reward": None,
    "think_format_reward": None,
    "get_soft_overlong_punishment": {"max_completion_len": 1280, "soft_punish_cache": 256},
}


def find_rewards(names: str | Sequence[str]) -> RewardBundle:
    """The rewards with these names, in one bundle.

    Args:
        names (`str` or `Sequence[str]`):
            Each is a bundle of this package (`gsm8k`, `hardened`, `math`, `tag`, or `notebooks`, which is `gsm8k` with
            the notebooks' quirks); a reward that `trl grpo` knows; or a dotted name, `package.module.name`, of a
            reward, a bundle, or a function without arguments that makes one. Modules are looked for in the working
            folder too.

    Returns:
        `RewardBundle`:
            All of them, with the weights of the bundles that have some.

    Raises:
        ValueError: If there is nothing of such a name, or it is no reward; the message is one line.
    """
    names = [names] if isinstance(names, str) else list(names)
    bundle = RewardBundle()
    for name in names:
        try:
            bundle = bundle + _find(name)
        except (ImportError, TypeError, ValueError) as error:  # a package may be missing
            raise ValueError(str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}") from error
    return bundle


def _find(name: str) -> list[Any]:
    if name in BUNDLES:
        return BUNDLES[name]()
    if name in TRL_REWARDS:
        require("a reward of TRL's")
        reward_func = getattr(import_module("trl.rewards"), name)
        arguments = TRL_REWARDS[name]
        return [reward_func if arguments is None else reward_func(**arguments)]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        known = [*BUNDLES, *TRL_REWARDS]
        listed = f". They are {', '.join(known)}, or a dotted name, such as my_rewards.my_reward"
        raise ValueError(f"there is no reward and no bundle of this name{suggestion(name, known) or listed}")
    found = _look_up(module_name, attribute)
    if callable(found) and not isinstance(found, type) and _makes_rewards(found):
        found = found()
    if isinstance(found, list | tuple):
        return found if isinstance(found, RewardBundle) else RewardBundle(found)
    if not callable(found):
        raise ValueError(f"it is a {type(found).__name__}, which is no reward and no bundle")
    return RewardBundle([found])


def _look_up(module_name: str, attribute: str) -> Any:
    """What a module calls by that name; like TRL, with the working folder among those that are looked through."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # the module is somebody's: whatever it raises
        raise ValueError(f"{module_name} cannot be imported ({type(error).__name__}: {error})") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ValueError(f"{module_name} has no {attribute!r}{suggestion(attribute, dir(module))}") from None


def _makes_rewards(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments; a reward is always given completions."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of C's cannot be looked at
        return False
    return all(
        parameter.default is not parameter.empty or parameter.kind is parameter.VAR_POSITIONAL
        for parameter in parameters
    ) and not {"completions", "prompts"} & {parameter.name for parameter in parameters}
