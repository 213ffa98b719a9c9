"""`MultiIterationMixin`: several passes over one batch of rollouts, cheap, safe and visible."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing

from . import compat
from .config import check_settings, extension_setting
from .metrics import Statistics, micro_batch_statistics, objective_statistics
from .objective import ClippedObjective, clip_binds
from .rollouts import (
    FOLDER,
    RolloutBuffer,
    RolloutError,
    column_advantages,
    loss_mask,
    rollout_files,
    save_no_rollouts,
)
from .shared_prefix.mixin import SharedPrefixMixin


logger = get_logger(__name__)

if TYPE_CHECKING:
    from trl import GRPOTrainer as _GRPOTrainer
else:
    _GRPOTrainer = object  # it may stand before any subclass of TRL's


class MultiIterationMixin(_GRPOTrainer):
    """Multi-iteration clipping for any `trl.GRPOTrainer`: `class MyTrainer(MultiIterationMixin, GRPOTrainer): ...`.

    With `num_iterations` > 1 each batch of rollouts is passed over several times. The mixin

    - takes the old policy's log-probabilities from the first pass where that is exact, and computes them only for the
      micro-batches for which it is not (`reuse_first_pass_logps`);
    - stops passing over rollouts from which the policy has moved too far (`target_kl`). What remains of the schedule
      is trained on completions sampled afresh for the same prompts;
    - leaves out completions that carry no gradient (`skip_zero_advantage`);
    - reports each pass by itself: `iteration/{k}/approx_kl` (KL from the old to the new policy, nats a token),
      `iteration/{k}/clip_ratio`, `iteration/{k}/clip_ratio_low`, `iteration/{k}/clip_ratio_high` (shares of tokens),
      `iteration/{k}/ratio_max`, with k from 1, `rollouts/iterations_used`, and `update/rows_skipped` of a generation
      batch on this process, next to all of TRL's metrics. Where rows are left out, the metrics over tokens (entropy,
      clip ratios, KL) cover those that are left;
    - keeps the rollouts in checkpoints, so that a run resumes exactly between two passes (`save_rollouts`).

    Settings are those of [`GRPOExtConfig`]; with a plain `GRPOConfig` their defaults hold. The loss is
    [`ClippedObjective`] for TRL's clipped loss types without further features, and `super()`'s for everything else:
    other loss types, an entropy bonus, images, a trainer with a loss of its own. All but `skip_zero_advantage` works
    for those too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_settings(self.args)
        self._awaits_old_policy_forward = False
        self._last_logps: torch.Tensor | None = None
        self._window_position = 0  # micro-batches since the last optimizer step
        self._pending_statistics: list[tuple[int, bool, torch.Tensor]] = []  # (iteration, is own loss, statistics)
        self._pass_sums: torch.Tensor | None = None  # over the pass so far: tokens, KL to the old policy
        self._has_explained_zeros = False
        self._train_sampler: Any = None

    # Rollouts

    @property
    def _rollouts(self) -> RolloutBuffer | None:
        """The current rollouts, which take the place of TRL's own list of micro-batches."""
        buffered = compat.buffered_micro_batches(self)
        return buffered if isinstance(buffered, RolloutBuffer) else None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        step, rollouts = compat.step(self), self._rollouts
        index = step % self.args.steps_per_generation
        if (
            rollouts is not None
            and index == 0
            and rollouts.iteration(step) > 1
            and extension_setting(self.args, "reshuffle_iterations")
            and rollouts.has_only_text
        ):
            rollouts.shuffle(self._window_within_rollouts() or 1, by_prompt=self._arranges_by_prompt(rollouts))
        super()._prepare_inputs(generation_batch)
        rollouts = self._rollouts
        if rollouts is None:  # TRL has just generated
            rollouts = self._new_rollouts(compat.buffered_micro_batches(self), step)
            compat.set_buffered_micro_batches(self, rollouts)
            self._pass_sums = None
        return rollouts.trimmed(index) if self._computes_own_loss(rollouts) else rollouts[index]

    def _new_rollouts(self, micro_batches: Sequence[dict[str, Any]], step: int) -> RolloutBuffer:
        rollouts = RolloutBuffer(micro_batches, start_step=step)
        window = self._window_within_rollouts()
        skips = self.beta == 0.0 and extension_setting(self.args, "skip_zero_advantage")
        by_prompt = self._arranges_by_prompt(rollouts)
        if window is not None and self._may_move_rows(rollouts) and (skips or by_prompt):
            rollouts.arrange(window, skip_zero_advantage=skips, by_prompt=by_prompt)
            compat.append_metric(self, "update/rows_skipped", float(rollouts.num_skipped))
        if compat.takes_old_policy_forward(self):
            until_optimizer_step = self.current_gradient_accumulation_steps - self._window_position
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                for index in range(len(rollouts)):
                    if rollouts.needs_old_logps(index) and rollouts.micro_batches_until(index) >= until_optimizer_step:
                        rollouts.set_old_logps(index, self._forward(self.model, rollouts[index])[0])
        return rollouts

    def _may_move_rows(self, rollouts: RolloutBuffer) -> bool:
        """Whether the loss is the same however the rows of an optimizer step are dealt out to micro-batches."""
        # bnpo divides by what is in the micro-batch
        return self.loss_type != "bnpo" and self._computes_own_loss(rollouts)

    def _arranges_by_prompt(self, rollouts: RolloutBuffer) -> bool:
        return (
            isinstance(self, SharedPrefixMixin)
            and self._may_move_rows(rollouts)
            and self.packs_rows_of(rollouts.padded_shape[1])
        )

    def _window_within_rollouts(self) -> int | None:
        """Micro-batches of an optimizer step within a pass; `None` if passes and optimizer steps do not line up."""
        accumulation, per_pass = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        if accumulation % per_pass == 0:
            return per_pass
        return accumulation if per_pass % accumulation == 0 else None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._awaits_old_policy_forward = (
            self.model.training
            and extension_setting(self.args, "reuse_first_pass_logps")
            and compat.takes_old_policy_forward(self)
            and not compat.corrects_sampling(self)
            and not compat.has_active_randomness(self.model)
        )
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._awaits_old_policy_forward = False

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._awaits_old_policy_forward and not torch.is_grad_enabled():
            # TRL's forward for the old policy, the first that it takes when it generates. `_new_rollouts` takes it for
            # the micro-batches that need it.
            self._awaits_old_policy_forward = False
            return None, None, None
        output = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._last_logps = output[0].detach()
        return output

    def _forward(self, model: Any, micro_batch: dict[str, Any], compute_entropy: bool = False) -> tuple[Any, ...]:
        """Log-probabilities and entropies of a micro-batch's completions, each `(B, C)`."""
        images = (  # and what comes with them
            "pixel_values",
            "image_grid_thw",
            "num_images",
            "pixel_attention_mask",
            "spatial_shapes",
            "num_tiles",
            "image_sizes",
            "token_type_ids",
            "mm_token_type_ids",
            "image_position_ids",
        )
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([micro_batch["prompt_ids"], micro_batch["completion_ids"]], dim=1),
            torch.cat([micro_batch["prompt_mask"], micro_batch["completion_mask"]], dim=1),
            micro_batch["completion_ids"].size(1),
            compute_entropy=compute_entropy,
            **{key: micro_batch[key] for key in images if micro_batch.get(key) is not None},
        )

    # Loss

    def _computes_own_loss(self, rollouts: RolloutBuffer) -> bool:
        """Whether the loss is [`ClippedObjective`]; else it is `super()`'s."""
        return (
            not compat.has_own_loss(super()._compute_loss)
            and compat.is_clipped_objective(self)
            and rollouts.has_only_text
        )

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        if not self.model.training or self._rollouts is None:
            return super()._compute_loss(model, inputs)
        step, rollouts = compat.step(self), self._rollouts
        index, iteration = step % self.args.steps_per_generation, rollouts.iteration(step)
        self._last_logps = None
        if self._computes_own_loss(rollouts):
            loss = self._clipped_loss(model, inputs, iteration)
        else:
            loss = super()._compute_loss(model, inputs)
            if self._last_logps is not None:
                self._observe_delegated_loss(inputs, self._last_logps, iteration)
        # Where TRL takes no forward for the old policy, it takes each pass for the first; so do we.
        if rollouts.needs_old_logps(index) and compat.takes_old_policy_forward(self):
            if self._last_logps is None:
                raise RuntimeError(
                    f"{type(self).__name__}._compute_loss did not call _get_per_token_logps_and_entropies, from which "
                    "the old policy's log-probabilities are taken: set reuse_first_pass_logps=False"
                )
            rollouts.set_old_logps(index, self._last_logps)
        self._last_logps = None
        self._window_position = 0 if self.accelerator.sync_gradients else self._window_position + 1
        if index == self.args.steps_per_generation - 1:
            self._end_pass(iteration)
        return loss

    def _clipped_loss(self, model: Any, inputs: dict[str, Any], iteration: int) -> torch.Tensor:
        mask = loss_mask(inputs)
        per_token_logps, entropies, _ = self._forward(model, inputs, compute_entropy=True)
        old_per_token_logps = inputs.get("old_per_token_logps")
        if old_per_token_logps is None:  # the first pass: this policy is the old one
            old_per_token_logps = per_token_logps.detach()
        objective = ClippedObjective(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
            beta=self.beta,
            correct_kl=self.args.use_bias_correction_kl,
            level=self.importance_sampling_level,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
        )
        accumulation = self.current_gradient_accumulation_steps
        num_tokens = None
        if self.loss_type == "dapo":
            # of an optimizer step on this process: `num_items_in_batch` counts the generation batch on all of them
            num_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            num_tokens = num_tokens * accumulation / self.args.steps_per_generation
        output = objective(
            per_token_logps,
            old_per_token_logps,
            inputs["advantages"],
            mask,
            inputs.get("ref_per_token_logps"),
            num_rows=self.args.per_device_train_batch_size,
            num_tokens=num_tokens,
        )
        log_ratio = per_token_logps.detach() - old_per_token_logps
        self._observe(objective_statistics(output, log_ratio, entropies), iteration, is_own_loss=True)
        return output.loss if self.loss_type == "dapo" else output.loss / accumulation

    # Metrics

    def _observe(self, statistics: torch.Tensor, iteration: int, is_own_loss: bool) -> None:
        self._pending_statistics.append((iteration, is_own_loss, statistics))
        if extension_setting(self.args, "target_kl") is not None:
            sums = statistics[:2].clone()  # tokens, KL to the old policy
            self._pass_sums = sums if self._pass_sums is None else self._pass_sums + sums

    def _observe_delegated_loss(self, inputs: dict[str, Any], per_token_logps: torch.Tensor, iteration: int) -> None:
        old_per_token_logps = inputs.get("old_per_token_logps")
        log_ratio = per_token_logps - (per_token_logps if old_per_token_logps is None else old_per_token_logps)
        clipped = clip_binds(torch.exp(log_ratio), column_advantages(inputs), self.epsilon_low, self.epsilon_high)
        self._observe(micro_batch_statistics(loss_mask(inputs), log_ratio, *clipped), iteration, is_own_loss=False)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._pending_statistics:
            self._report_statistics()
        super().log(logs, start_time)

    def _report_statistics(self) -> None:
        """Bring the statistics of all processes together, in one call, and hand them to TRL's metrics."""
        iterations = [iteration for iteration, _, _ in self._pending_statistics]
        are_own = [is_own_loss for _, is_own_loss, _ in self._pending_statistics]
        local = torch.stack([statistics for _, _, statistics in self._pending_statistics])
        self._pending_statistics.clear()
        gathered = self.accelerator.gather(local.unsqueeze(0)).cpu()  # (processes, micro-batches, fields)
        for position, is_own_loss in enumerate(are_own):
            if is_own_loss:
                metrics = Statistics(gathered[:, position]).of_trl(with_reference=self.beta != 0.0)
                for name, value in metrics.items():
                    compat.append_metric(self, name, value)
        for iteration in sorted(set(iterations)):
            positions = [position for position, found in enumerate(iterations) if found == iteration]
            metrics = Statistics(gathered[:, positions].flatten(0, 1)).of_iteration()
            for name, value in metrics.items():
                compat.append_metric(self, f"iteration/{iteration}/{name}", value)
            if iteration == 1 and metrics["clip_ratio"] == 0.0 and not self._has_explained_zeros:
                self._has_explained_zeros = True
                logger.warning(
                    "clip_ratio is 0 on the first pass over a batch of rollouts, and so is the loss without a KL "
                    "term: that is right. The policy still is the one that sampled, every ratio is 1, and advantages "
                    "are 0 on average; the gradient is not 0."
                )

    # KL stop

    def _end_pass(self, iteration: int) -> None:
        """After the last micro-batch of a pass: is there to be another one over these rollouts?"""
        target_kl = extension_setting(self.args, "target_kl")
        is_last = (compat.step(self) + 1) % (self.args.steps_per_generation * self.num_iterations) == 0
        stops = False
        if target_kl is not None:
            tokens, kl = self.accelerator.reduce(self._pass_sums, reduction="sum").tolist()  # the same on all ranks
            stops = kl > target_kl * max(tokens, 1.0)
        self._pass_sums = None
        if stops or is_last:
            compat.append_metric(self, "rollouts/iterations_used", float(iteration))
            compat.set_buffered_micro_batches(self, None)

    # Checkpoints

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the rest: the trainer's state, which makes a folder a checkpoint, is written last.
        if extension_setting(self.args, "save_rollouts"):
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
            state = {
                "step": compat.step(self),
                "global_step": self.state.global_step,
                "settings": self._batch_settings(),
                "pass_sums": None if self._pass_sums is None else self._pass_sums.tolist(),
            }
            if self._rollouts is None:
                save_no_rollouts(folder / FOLDER, rank, num_ranks, state)
            else:
                self._rollouts.save(folder / FOLDER, rank, num_ranks, state)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollouts(Path(checkpoint) / FOLDER)

    def _load_rollouts(self, folder: Path) -> None:
        self._pass_sums, self._window_position = None, 0
        compat.set_buffered_micro_batches(self, None)
        # TRL would count from 0, and then generate in the middle of the passes over a batch of prompts.
        compat.set_step(self, self.state.global_step * self.args.gradient_accumulation_steps)
        # The sampler draws the order of prompts when an epoch begins, each from the generator that the one before has
        # left. Transformers goes to the place in the epoch, but would go there in the first epoch's order.
        for _ in range(int(self.state.epoch or 0)):
            next(iter(self._train_sampler), None)
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        found = sorted(folder.glob("rank-*-of-*.*"))
        if not found:
            logger.warning(f"There are no rollouts in {folder}: going on with fresh ones.")
            return
        of_as_many = sorted(folder.glob(f"rank-*-of-{num_ranks:05d}.*"))
        if not of_as_many:
            logger.warning(f"The rollouts in {folder} are of another number of processes: going on with fresh ones.")
            return
        rollouts, state = RolloutBuffer.load(folder, rank, num_ranks, self.accelerator.device)
        if state["global_step"] != self.state.global_step:
            raise RolloutError(
                f"{rollout_files(folder, rank, num_ranks)[1]} is of step {state['global_step']}, this checkpoint of "
                f"step {self.state.global_step}; delete the folder {str(folder)!r} to go on with fresh rollouts"
            )
        settings = self._batch_settings()
        if state["settings"] != settings:
            changed = {
                name: (value, settings.get(name))
                for name, value in state["settings"].items()
                if value != settings.get(name)
            }
            logger.warning(f"Batch settings changed since the checkpoint ({changed}): going on with fresh rollouts.")
            return
        compat.set_step(self, state["step"])
        compat.set_buffered_micro_batches(self, rollouts)
        if state["pass_sums"] is not None:
            self._pass_sums = torch.tensor(state["pass_sums"], device=self.accelerator.device)

    def _batch_settings(self) -> dict[str, int]:
        """The settings on which the shape of the rollouts depends."""
        return {
            name: getattr(self.args, name)
            for name in (
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "steps_per_generation",
                "num_iterations",
                "num_generations",
            )
        }
