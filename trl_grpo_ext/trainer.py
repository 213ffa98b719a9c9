"""`GRPOExtTrainer`: the mixins on TRL's trainer, ready made."""

from typing import Any, ClassVar

from trl import GRPOTrainer

from .checkpoints import WholeCheckpointsMixin
from .config import GRPOExtConfig
from .iterations import MultiIterationMixin
from .shared_prefix import SharedPrefixMixin


class GRPOExtTrainer(WholeCheckpointsMixin, MultiIterationMixin, SharedPrefixMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with multi-iteration clipping, a shared prefix, and checkpoints that are whole or not there.

    Arguments are the same, with a [`GRPOExtConfig`] for `args`.

    Example:
    ```python
    >>> trainer = GRPOExtTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=gsm8k_bundle(),
    ...     args=GRPOExtConfig(num_iterations=4, target_kl=0.01),
    ...     train_dataset=load_gsm8k(),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "trl_grpo_ext"]

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **kwargs: Any) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GRPOExtConfig(f"{str(name).rstrip('/').split('/')[-1] or 'model'}-GRPO")
        super().__init__(model, reward_funcs, args=args, **kwargs)
