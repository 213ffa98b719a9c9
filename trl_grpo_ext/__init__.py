"""An extension layer on TRL's `GRPOTrainer`.

- [`trl_grpo_ext.rewards`]: reward functions and bundles, usable in any TRL pipeline;
- [`MultiIterationMixin`], [`GRPOExtTrainer`], [`GRPOExtConfig`]: several passes over one batch of rollouts;
- [`SharedPrefixMixin`]: an update that computes each prompt once and no padding, with the same gradient;
- [`WholeCheckpointsMixin`]: checkpoints that are whole or not there, whatever ends a run;
- [`UndisturbedEvaluationMixin`]: an evaluation in between changes nothing of what is trained;
- [`EvaluationCallback`]: held-out problems before, during and after training, in every tracker;
- [`RunRecordCallback`]: a run's own record, written while it trains; [`trl_grpo_ext.report`]: what is made of it;
- [`trl_grpo_ext.objective`]: the loss types and the sampler's correction as pure functions;
- [`trl_grpo_ext.tasks`]: anybody's questions and answers, GSM8K, MATH, SVAMP, ASDiv, and word problems from a seed;
- [`trl_grpo_ext.evaluation`]: accuracies under four conventions, pass@k and maj@k, with intervals;
- [`trl_grpo_ext.grpo`]: GRPO on any data, as a script; [`trl_grpo_ext.script`]: what such scripts need;
- [`trl_grpo_ext.embedded_policy`]: a tiny policy for runs without a hub.

Importing this package imports no torch; the trainer's names are looked up when they are first used. They need the
extra `train`; rewards, grades and the report do without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import explain_missing_packages, require


if TYPE_CHECKING:
    from .checkpoints import WholeCheckpointsMixin
    from .config import GRPOExtConfig
    from .evaluation.callback import EvaluationCallback
    from .evaluation.undisturbed import UndisturbedEvaluationMixin
    from .iterations import MultiIterationMixin
    from .report.callback import RunRecordCallback
    from .shared_prefix import SharedPrefixMixin
    from .trainer import GRPOExtTrainer

__version__ = "0.1.0"
__all__ = [
    "EvaluationCallback",
    "GRPOExtConfig",
    "GRPOExtTrainer",
    "MultiIterationMixin",
    "RunRecordCallback",
    "SharedPrefixMixin",
    "UndisturbedEvaluationMixin",
    "WholeCheckpointsMixin",
]

_MODULES = {
    "EvaluationCallback": "evaluation.callback",
    "GRPOExtConfig": "config",
    "GRPOExtTrainer": "trainer",
    "MultiIterationMixin": "iterations",
    "RunRecordCallback": "report.callback",
    "SharedPrefixMixin": "shared_prefix",
    "UndisturbedEvaluationMixin": "evaluation.undisturbed",
    "WholeCheckpointsMixin": "checkpoints",
}

explain_missing_packages()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require(name)
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
