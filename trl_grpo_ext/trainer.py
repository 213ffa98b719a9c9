"""`GRPOExtTrainer`: the mixins on TRL's trainer, ready made."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from trl import GRPOConfig, GRPOTrainer

from . import compat
from .checkpoints import WholeCheckpointsMixin
from .config import GRPOExtConfig, extension_setting
from .evaluation.undisturbed import UndisturbedEvaluationMixin
from .iterations import MultiIterationMixin
from .legible import name_base_model, show_completions, show_rewards_in_notebooks
from .report.about import reference_column
from .report.callback import RunRecordCallback
from .rewards.audit import check_references
from .rewards.bundle import RewardBundle, refuse_what_is_no_reward
from .rewards.references import reference_to_text
from .rewards.worker_pool import close_workers
from .shared_prefix import SharedPrefixMixin


class GRPOExtTrainer(
    WholeCheckpointsMixin, MultiIterationMixin, SharedPrefixMixin, UndisturbedEvaluationMixin, GRPOTrainer
):
    """`trl.GRPOTrainer` with multi-iteration clipping, a shared prefix, and checkpoints that are whole or not there.

    Evaluations in between do not change what it trains. It writes a record of its run, `record.jsonl` in the output
    folder, from which `trl-grpo-ext report` makes a page, see [`RunRecordCallback`].

    Arguments are the same, in the same order, with a [`GRPOExtConfig`] for `args`. Besides, it knows the rewards of
    this package: the weights of a [`RewardBundle`] are taken from it (and `args.reward_weights` must not contradict
    them), and the answer rewards must be able to grade the data sets' first rows, see [`check_references`].

    Example:
    ```python
    >>> trainer = GRPOExtTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=gsm8k_bundle(),
    ...     args=GRPOExtConfig(num_iterations=4, target_kl=0.01),
    ...     train_dataset=load_gsm8k(),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "trl_grpo_ext"]
    reward_weights: torch.Tensor

    def __init__(self, *positional: Any, **named: Any) -> None:
        signature = inspect.signature(GRPOTrainer.__init__)
        others = {name: named.pop(name) for name in [*named] if name not in signature.parameters}  # of other classes
        given = signature.bind(self, *positional, **named).arguments
        del given["self"]
        model, reward_funcs, args = given["model"], given.get("reward_funcs"), given.get("args")
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = GRPOExtConfig(f"{str(name).rstrip('/').split('/')[-1] or 'model'}-GRPO")
        reward_weights = weights_of(reward_funcs, args.reward_weights)
        check_rewards(reward_funcs, args, given)
        if isinstance(reward_funcs, RewardBundle | tuple):
            reward_funcs = list(reward_funcs)  # TRL writes into its list: reward models, an environment's own reward
        given.update(reward_funcs=reward_funcs, args=args)
        super().__init__(**given, **others)
        if reward_weights is not None:
            # An environment's own reward has come after the bundle's, and keeps the weight that TRL gives it.
            weights_of_others = self.reward_weights[len(reward_weights) :]
            self.reward_weights = torch.cat([self.reward_weights.new_tensor(reward_weights), weights_of_others])
        if extension_setting(args, "record_run"):
            self.add_callback(RunRecordCallback(self))
        show_rewards_in_notebooks(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL's trainer does; worker processes of rewards that compare mathematics end with it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            close_workers()  # those that are needed again are started again

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, *args, **kwargs)
        if self.log_completions:
            column = reference_column(self.reward_funcs)
            if column in inputs[0]:
                compat.log_column(self, "reference", [reference_to_text(row.get(column)) for row in inputs])
        return rewards

    def log(self, *args: Any, **kwargs: Any) -> None:
        if not self.log_completions:
            return super().log(*args, **kwargs)
        weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        with compat.completions_shown_by(partial(show_completions, weights)):
            super().log(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            name_base_model(self)

    __init__.__signature__ = inspect.signature(GRPOTrainer.__init__)  # type: ignore[attr-defined]


def weights_of(reward_funcs: Any, reward_weights: list[float] | None) -> list[float] | None:
    """The weights of a bundle where the arguments name none; `None` where TRL needs to be told nothing.

    Raises:
        ValueError: If `reward_weights` has another length than the bundle, or other values than were set in it.
    """
    if not isinstance(reward_funcs, RewardBundle):
        return None
    if reward_weights is None:
        return reward_funcs.weights
    remedy = "leave args.reward_weights out, and set weights with the bundle's with_weights"
    if len(reward_weights) != len(reward_funcs):
        raise ValueError(
            f"args.reward_weights has {len(reward_weights)} weights for the {len(reward_funcs)} rewards of "
            f"{reward_funcs!r}: {remedy}"
        )
    if reward_funcs.has_own_weights and list(map(float, reward_weights)) != reward_funcs.weights:
        raise ValueError(f"args.reward_weights={reward_weights!r} contradicts {reward_funcs!r}: {remedy}")
    return None


def check_rewards(reward_funcs: Any, args: GRPOConfig, given: Mapping[str, Any]) -> None:
    """Raise unless the rewards are some, and can grade the data sets. `given` are the arguments by name."""
    rewards = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if reward_funcs is not None and not isinstance(reward_funcs, list | tuple | str) and not callable(reward_funcs):
        raise TypeError(f"reward_funcs must be a reward or a list of rewards, got a {type(reward_funcs).__name__}")
    for reward_func in rewards:
        refuse_what_is_no_reward(reward_func)
    if not extension_setting(args, "check_references"):
        return
    may_lack_column = given.get("rollout_func") is not None  # it can add columns
    check_references(rewards, given.get("train_dataset"), may_lack_column=may_lack_column)
    if args.eval_strategy != "no":
        eval_datasets = given.get("eval_dataset")
        for dataset in eval_datasets.values() if isinstance(eval_datasets, Mapping) else [eval_datasets]:
            check_references(rewards, dataset, dataset_name="eval_dataset", may_lack_column=may_lack_column)
