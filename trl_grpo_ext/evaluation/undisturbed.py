"""`UndisturbedEvaluationMixin`: a run that evaluates ends with the weights of the run that does not."""

from typing import Any

from .. import compat
from ..mixin_order import OrderedMixin


class UndisturbedEvaluationMixin(OrderedMixin):
    """Evaluation that leaves no trace in training, for any `trl.GRPOTrainer`.

    `evaluate` samples completions, and `trl.GRPOTrainer` goes on from where that has left the random generators, so
    that a run depends on how often it is looked at. Behind this one's `evaluate` generators, modules' modes, rollouts
    and the completions that are logged are as they were: the weights at the end are, bit for bit, those of a run
    without. A vLLM server's generator cannot be set back; TRL merges a LoRA adapter to bring its weights to vLLM, and
    taking it out again leaves rounding.
    """

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with compat.evaluation_undone(self):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        was_training = self.model.training
        try:
            return super()._generate(*args, **kwargs)
        finally:
            # TRL leaves a model in training mode that generated with continuous batching: an evaluation would then
            # take training's rollouts for its own.
            if self.model.training != was_training:
                self.model.train(was_training)
