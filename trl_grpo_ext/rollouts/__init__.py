"""The rows of a generation batch: what is known of them, where they are computed, and what a checkpoint keeps."""

from .balance import slowest_over_mean, work_of_a_pair
from .buffer import RolloutBuffer, load_matching_rollouts
from .exchange import Ranks
from .files import FOLDER, RolloutError, rollout_files, save_no_rollouts
from .rows import (
    MicroBatch,
    carries_gradient,
    column_advantages,
    has_weight,
    logps_of_completions,
    loss_mask,
)


__all__ = [
    "FOLDER",
    "MicroBatch",
    "Ranks",
    "RolloutBuffer",
    "RolloutError",
    "carries_gradient",
    "column_advantages",
    "has_weight",
    "load_matching_rollouts",
    "logps_of_completions",
    "loss_mask",
    "rollout_files",
    "save_no_rollouts",
    "slowest_over_mean",
    "work_of_a_pair",
]
