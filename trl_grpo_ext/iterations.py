"""`MultiIterationMixin`: several passes over one batch of rollouts, cheap, safe and visible."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from trl.models.utils import disable_gradient_checkpointing

from . import compat
from .config import check_settings, extension_setting, rollout_settings, tokens_per_micro_batch
from .loss_comparison import differ, made_up_micro_batch
from .metrics import (
    SamplingStatistics,
    micro_batch_statistics,
    nothing_seen,
    objective_statistics,
    sampling_statistics,
)
from .mixin_order import OrderedMixin
from .objective import LOSS_TYPES, ClippedObjective, ObjectiveOutput, clipped_places, sampling_weights
from .passes import PassStatistics, can_shorten, exceeds_target, window_within_pass
from .ranks import is_so_anywhere, ranks_with_the_same_rows
from .rollouts import (
    FOLDER,
    Ranks,
    RolloutBuffer,
    carries_gradient,
    column_advantages,
    has_weight,
    load_matching_rollouts,
    logps_of_completions,
    loss_mask,
    save_no_rollouts,
    slowest_over_mean,
    work_of_a_pair,
)
from .shared_prefix.mixin import SharedPrefixMixin


logger = get_logger(__name__)


class MultiIterationMixin(OrderedMixin):
    """Multi-iteration clipping for any `trl.GRPOTrainer`: `class MyTrainer(MultiIterationMixin, GRPOTrainer): ...`.

    With `num_iterations` > 1 each batch of rollouts is passed over several times. The mixin

    - takes the old policy's log-probabilities from the first pass where that is exact, and computes them only for the
      micro-batches for which it is not (`reuse_first_pass_logps`);
    - stops passing over rollouts from which the policy has moved too far (`target_kl`). What remains of the schedule
      is trained on completions sampled afresh for the same prompts;
    - leaves out completions that carry no gradient (`skip_zero_advantage`), and of those to which vLLM's importance
      sampling correction gives the weight 0 the passes that follow the one in which that is found;
    - reports each pass by itself: `iteration/{k}/approx_kl` (KL from the old to the new policy, nats a token),
      `iteration/{k}/clip_ratio`, `iteration/{k}/clip_ratio_low`, `iteration/{k}/clip_ratio_high` (shares of tokens),
      `iteration/{k}/ratio_max`, with k from 1, all over the completions that carry a gradient (sapo and vespo have
      nothing to clip); `rollouts/iterations_used`; and of a generation batch on this process `update/rows_skipped`
      and, once that is known, `update/rows_without_weight`;
    - deals rows out to fewer and fuller micro-batches (`tokens_per_micro_batch`), and reports of an optimizer step's
      micro-batches on this process how many have a row, `update/micro_batches_used`, and the tokens of the fullest,
      `update/tokens_of_fullest`, wherever rows are dealt out;
    - deals the rows of an optimizer step out over all processes, about equal work to each (`balance_ranks`), and
      reports of a generation batch `update/rows_moved`, of all processes, and of this one `update/exchange_s` and
      `update/exchange_mb`;
    - reports of a generation batch, among several processes, `update/slowest_rank`: the tokens of the process that has
      most of them in an optimizer step, over their mean, and `update/slowest_rank_unbalanced`, what it would have been
      had rows stayed where they were generated. The others wait for it;
    - reports TRL's own metrics of the loss (clip ratios, KL, entropy) once an optimizer step, weighed by tokens. The
      clip ratios are TRL's, whose denominators count completions without an advantage that were left out too; the
      entropy is that of the completions that were computed;
    - keeps the rollouts in checkpoints, so that a run resumes exactly between two passes (`save_rollouts`).

    Settings are those of [`GRPOExtConfig`]; with a plain `GRPOConfig` their defaults hold.

    Who computes the loss decides what is on. TRL's own, of every loss type, is computed here, as a
    [`ClippedObjective`], with vLLM's importance sampling correction too: where the old policy's log-probabilities come
    from the first pass, so do the completions' weights and TRL's `sampling/...` metrics, which then are over the
    completions that are computed. With an entropy bonus, an entropy quantile, a MoE's auxiliary loss or images it is
    computed by TRL: rows stay where it puts them, the rest works. Where a subclass, or a function put in TRL's place,
    computes the loss, rows stay too, and the old policy's log-probabilities are computed as TRL does it, because that
    loss may read them. So they are wherever a method of TRL's is overridden that sees micro-batches or makes forwards.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_settings(self.args)
        target_kl = extension_setting(self.args, "target_kl")
        schedule = self.num_iterations, self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if target_kl is not None and not can_shorten(*schedule):
            logger.warning(
                f"target_kl={target_kl!r} has nothing to end: of num_iterations={self.num_iterations} passes over a "
                "batch of rollouts, only the last is made by a policy that has moved."
            )
        compat.save_on_signal_behind_optimizer_steps(self)
        self._pass_statistics, self._sampling_statistics = PassStatistics(), SamplingStatistics()
        self._window_position = 0  # micro-batches since the last optimizer step
        self._is_in_micro_batch = False  # between its rows and its end
        self._loss_logps: torch.Tensor | None = None  # the policy's of this micro-batch, as the loss got them, (B, C)
        self._has_own_statistics = False  # of the micro-batch that is trained on
        self._has_explained_zeros = False
        self._reported_losses: set[str] = set()
        self._compared_losses: dict[tuple[Any, ...], str | None] = {}  # by their kind, why TRL's is not ours
        self._fast_paths: dict[str, str] = {}
        self._has_reported_tokens = False  # that tokens_per_micro_batch cannot be kept, or does nothing
        self._train_sampler: Any = None

    # Rollouts

    @property
    def _rollouts(self) -> RolloutBuffer | None:
        """The current rollouts, which take the place of TRL's own list of micro-batches."""
        buffered = compat.buffered_micro_batches(self)
        return buffered if isinstance(buffered, RolloutBuffer) else None

    @property
    def fast_paths(self) -> dict[str, str]:
        """What of the mixins is on, or why not, as far as that is known by now."""
        return {**getattr(super(), "fast_paths", {}), **self._fast_paths}

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._is_in_micro_batch:
            self._report_training_step()
        self._is_in_micro_batch = True
        step, rollouts = compat.step(self), self._rollouts
        if rollouts is not None and not self._goes_on_with(rollouts):
            rollouts = None
            compat.set_buffered_micro_batches(self, None)
        if rollouts is not None and step % self.args.steps_per_generation == 0 and rollouts.iteration(step) > 1:
            if rollouts.iteration(step) == 2:  # the first pass has told the weights of all rows
                self._leave_out_rows_without_weight(rollouts)
                if rollouts.skips_rows_without_weight:
                    compat.append_metric(self, "update/rows_without_weight", float(rollouts.num_without_weight))
            if extension_setting(self.args, "reshuffle_iterations") and rollouts.has_only_text:
                rollouts.shuffle(self._window_within_rollouts() or 1, **self._how_to_deal(rollouts))
        inputs = super()._prepare_inputs(generation_batch)
        if self._rollouts is not None:
            return inputs
        micro_batches = compat.buffered_micro_batches(self)  # TRL has just generated
        rollouts = self._new_rollouts(micro_batches, step)
        compat.set_buffered_micro_batches(self, rollouts)  # which knows the layout of the forwards that follow
        try:
            self._take_old_policy_forwards(rollouts)
        except BaseException:  # rows without the old policy's log-probabilities are not to be gone on with
            compat.set_buffered_micro_batches(self, micro_batches)
            raise
        self._pass_statistics.end_pass()
        index = step % self.args.steps_per_generation
        return rollouts[index] if inputs is micro_batches[index] else inputs  # or what a trainer below made of it

    def _goes_on_with(self, rollouts: RolloutBuffer) -> bool:
        """Whether rows that were dealt out for the loss as it was may be passed over with the loss as it is."""
        misses_rows = rollouts.skips_rows and self.beta != 0.0
        misses_rows |= rollouts.skips_rows_without_weight and not self._zero_weight_is_no_gradient()
        if not rollouts.is_arranged or (self._may_move_rows(rollouts) and not misses_rows):
            return True
        logger.warning(
            "The loss has changed between two passes over rollouts whose rows were dealt out for the old one: going "
            "on with fresh ones."
        )
        return False

    def _new_rollouts(self, micro_batches: Sequence[dict[str, Any]], step: int) -> RolloutBuffer:
        rollouts = RolloutBuffer(micro_batches, start_step=step)
        rollouts.has_only_text = not is_so_anywhere(self.accelerator, not rollouts.has_only_text)
        self._report_foreign_loss()
        window = self._window_within_rollouts()
        if window is not None and (step - self._window_position) % window != 0:
            window = None  # an optimizer step was broken off, or an epoch ended in one: they do not line up any more
        skips = self.beta == 0.0 and extension_setting(self.args, "skip_zero_advantage")
        how = self._how_to_deal(rollouts)
        may_move = self._may_move_rows(rollouts)
        self._fast_paths["rows_left_out"] = self._why_rows_are_computed(window, may_move) or ("on" if skips else "off")
        ranks = self._ranks_to_deal_to(window, may_move)
        deals = skips or how["by_prompt"] or how["most_tokens"] is not None or ranks is not None
        if window is not None and may_move and deals:
            rollouts.arrange(
                window,
                skip_zero_advantage=skips,
                skip_zero_weight=self._zero_weight_is_no_gradient(),
                ranks=ranks,
                **how,
            )
            compat.append_metric(self, "update/rows_skipped", float(rollouts.num_skipped))
            self._report_exchange(rollouts, ranks)
        self._report_tokens_per_micro_batch(rollouts, may_move)
        self._report_slowest_rank(rollouts, window)
        return rollouts

    def _ranks_to_deal_to(self, window: int | None, may_move: bool) -> Ranks | None:
        """The processes, if rows are dealt out over them."""
        if self.accelerator.num_processes == 1:
            return None
        reason = None
        if not extension_setting(self.args, "balance_ranks"):
            reason = "off"
        elif (obstacle := self._why_not_dealt_out(window, may_move)) is not None:
            reason = f"off: {obstacle}"
        elif (sharers := ranks_with_the_same_rows(self.accelerator)) is not None:
            reason = f"off: with {sharers} several processes compute the same rows"
        self._fast_paths["balance_ranks"] = reason or "on"
        if reason is not None:
            return None
        config = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).config.get_text_config()
        return Ranks(self.accelerator, getattr(config, "pad_token_id", None) or 0, work_of_a_pair(config))

    def _report_exchange(self, rollouts: RolloutBuffer, ranks: Ranks | None) -> None:
        """What it took to deal rows out over processes, of a generation batch."""
        figures = rollouts.exchange
        if figures is not None:
            compat.append_metric(self, "update/rows_moved", float(figures.num_moved))
            compat.append_metric(self, "update/exchange_s", figures.seconds)
            compat.append_metric(self, "update/exchange_mb", figures.sent_bytes / 1e6)
            compat.append_metric(self, "update/slowest_rank_unbalanced", figures.slowest_before)
        elif ranks is not None:
            self._fast_paths["balance_ranks"] = "off: processes have rows of different kinds"

    def _why_rows_are_computed(self, window: int | None, may_move: bool) -> str | None:
        """Why completions without a gradient are computed, where the setting for it does not say so."""
        if self.beta != 0.0:
            return f"off: with a KL term (beta={self.beta}) each completion has a gradient"
        obstacle = self._why_not_dealt_out(window, may_move)
        return None if obstacle is None else f"off: {obstacle}"

    def _why_not_dealt_out(self, window: int | None, may_move: bool) -> str | None:
        """Why these rows stay where TRL puts them."""
        if not may_move:
            return self.why_rows_stay() or "these rows are not of text alone"
        return None if window is not None else "passes and optimizer steps do not line up"

    def _report_slowest_rank(self, rollouts: RolloutBuffer, window: int | None) -> None:
        """Tokens of the slowest process of each optimizer step, which the others wait for, over their mean."""
        if self.accelerator.num_processes == 1:
            return
        by_prompt = self._arranges_by_prompt(rollouts)
        if rollouts.is_arranged or by_prompt:
            tokens = [rollouts.num_tokens(index, by_prompt) for index in range(len(rollouts))]
        else:
            tokens = [math.prod(rollouts.padded_shape)] * len(rollouts)
        of_steps = torch.tensor(tokens, device=self.accelerator.device).view(-1, window or len(rollouts)).sum(1)
        of_ranks = self.accelerator.gather(of_steps.unsqueeze(0)).cpu().numpy()
        compat.append_metric(self, "update/slowest_rank", slowest_over_mean(of_ranks.T))

    def _take_old_policy_forwards(self, rollouts: RolloutBuffer) -> None:
        """Of the micro-batches for which the first pass is not the old policy's."""
        if compat.takes_old_policy_forward(self):
            until_optimizer_step = self.current_gradient_accumulation_steps - self._window_position
            if compat.corrects_sampling(self) and not self._computes_own_loss(rollouts):
                until_optimizer_step = 0  # TRL's loss needs the weights in the first pass
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                for index in range(len(rollouts)):
                    if rollouts.needs_old_logps(index) and rollouts.micro_batches_until(index) >= until_optimizer_step:
                        logps = self._forward(self.model, rollouts.forward_inputs(index))[0]
                        self._keep_old_logps(rollouts, index, logps)
            self._leave_out_rows_without_weight(rollouts)

    def _leave_out_rows_without_weight(self, rollouts: RolloutBuffer) -> None:
        window = self._window_within_rollouts()
        if (
            rollouts.skips_rows
            and window is not None
            and self._zero_weight_is_no_gradient()
            and self._may_move_rows(rollouts)
        ):
            rollouts.leave_out_rows_without_weight(window, **self._how_to_deal(rollouts))

    def _zero_weight_is_no_gradient(self) -> bool:
        """Whether the sampler's correction gives rows the weight 0, and these then have no gradient."""
        masks = compat.corrects_sampling(self) and self.vllm_importance_sampling_mode.endswith("mask")
        return masks and self._surrogate() != "vespo"  # VESPO bounds the weights that it is given

    def _may_move_rows(self, rollouts: RolloutBuffer) -> bool:
        """Whether the loss is the same however the rows of an optimizer step are dealt out to micro-batches."""
        return self._computes_own_loss(rollouts) and self._why_micro_batches_stay() is None

    def why_rows_stay(self) -> str | None:
        """Why rows stay in the micro-batches where TRL puts them, and all are computed; `None` if they may move."""
        return self._why_not_own_loss() or self._why_micro_batches_stay()

    def _why_micro_batches_stay(self) -> str | None:
        if LOSS_TYPES[self.loss_type].normalizer == "tokens":
            return f"loss_type {self.loss_type!r} is a mean over the tokens of each micro-batch"
        override = self._knower_of_micro_batches()
        return None if override is None else f"{override} may change rows, or know them"

    def _knower_of_micro_batches(self) -> str | None:
        """Who else prepares micro-batches, or trains on them: who does may change rows, or know them."""
        overrides = (compat.foreign_override(self, name) for name in ("_prepare_inputs", "training_step"))
        return next(filter(None, overrides), None)

    def _how_to_deal(self, rollouts: RolloutBuffer) -> dict[str, Any]:
        """What [`RolloutBuffer.arrange`] goes by whenever it deals out rows."""
        return {
            "by_prompt": self._arranges_by_prompt(rollouts),
            "most_tokens": tokens_per_micro_batch(self.args),
        }

    def _report_tokens_per_micro_batch(self, rollouts: RolloutBuffer, may_move: bool) -> None:
        """Say once where `tokens_per_micro_batch` does nothing, or is exceeded."""
        tokens = tokens_per_micro_batch(self.args)
        if tokens is None or self._has_reported_tokens:
            return
        setting = f"tokens_per_micro_batch={tokens!r}"
        if not may_move:
            self._has_reported_tokens = True
            logger.warning(f"{setting} does nothing: with this trainer and loss, rows stay in their micro-batches.")
        elif rollouts.is_arranged and tokens != "auto":
            by_prompt = self._arranges_by_prompt(rollouts)
            fullest = max(range(len(rollouts)), key=lambda index: rollouts.num_tokens(index, by_prompt))
            found = rollouts.num_tokens(fullest, by_prompt)
            if found > int(tokens):
                self._has_reported_tokens = True
                reason = "its only row is as long"
                if len(rollouts[fullest]["completion_ids"]) > 1:
                    reason = (
                        f"the rows of an optimizer step do not fit into its {self._window_within_rollouts()} "
                        "micro-batches: set a larger number, or more of them (gradient_accumulation_steps) of fewer "
                        "rows each (per_device_train_batch_size)"
                    )
                logger.warning(
                    f"{setting} cannot be kept: a micro-batch has {found} tokens, {found - int(tokens)} more, because "
                    f"{reason}."
                )

    def _arranges_by_prompt(self, rollouts: RolloutBuffer) -> bool:
        return (
            isinstance(self, SharedPrefixMixin)
            and self._may_move_rows(rollouts)
            and self.packs_rows_of(rollouts.padded_shape[1])
        )

    def _window_within_rollouts(self) -> int | None:
        """Micro-batches of an optimizer step within a pass; `None` if passes and optimizer steps do not line up."""
        return window_within_pass(self.args.steps_per_generation, self.args.gradient_accumulation_steps)

    # Old policy

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        reuses = False
        if self.model.training:
            is_needed = compat.takes_old_policy_forward(self)
            why_not = self.why_no_reuse() if is_needed else "not needed: TRL takes no forward for the old policy"
            reuses = why_not is None
            self._fast_paths["reuse_first_pass_logps"] = "on" if reuses else f"{'off: ' if is_needed else ''}{why_not}"
        with compat.without_old_policy_forward(self) if reuses else nullcontext():
            return super()._generate_and_score_completions(inputs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        generated = super()._generate(*args, **kwargs)
        if compat.corrects_sampling(self) and compat.sampling_logps_of(generated) is None:
            raise ValueError(
                "vllm_importance_sampling_correction=True needs the sampler's log-probabilities, and the completions "
                "came without: let rollout_func return them as 'logprobs', or set it to False"
            )
        return generated

    def why_no_reuse(self) -> str | None:
        """Why TRL's forward for the old policy is taken where it would take one; `None` if it is left out.

        Then `_new_rollouts` takes it for the micro-batches for which the first pass is not the old policy's.
        """
        may_need_it = (
            *("compute_loss", "_compute_loss", "training_step", "_prepare_inputs"),
            *("_generate_and_score_completions", "_get_per_token_logps_and_entropies"),
        )
        if not extension_setting(self.args, "reuse_first_pass_logps"):
            return "reuse_first_pass_logps is False"
        feature = compat.feature_beside_objective(self)
        if compat.corrects_sampling(self) and feature is not None:
            return f"vLLM's correction needs it where the loss has {feature}"
        override = next(filter(None, (compat.foreign_override(self, name) for name in may_need_it)), None)
        if override is not None:
            return f"{override} may read it"
        if compat.forwards_are_random(self):
            return "two forwards of this model differ in training: there is dropout, or other randomness"
        return None

    def _keep_old_logps(self, rollouts: RolloutBuffer, index: int, per_token_logps: torch.Tensor) -> None:
        """Keep the old policy's log-probabilities of a micro-batch, and what they say about a sampler that differs."""
        rollouts.set_old_logps(index, per_token_logps)
        rows = rollouts[index]
        if not compat.corrects_sampling(self) or "importance_sampling_ratio" in rows:
            return  # weights that came with the rows stay
        weights = self._sampling_weights(rows, rows["old_per_token_logps"])
        rollouts.set_weights(index, weights)
        logps = rows["old_per_token_logps"], rows["sampling_per_token_logps"]
        statistics = sampling_statistics(*logps, loss_mask(rows), weights, rollouts.is_placeholder(index))
        self._sampling_statistics.observe(statistics)

    def _sampling_weights(self, rows: dict[str, Any], old_per_token_logps: torch.Tensor) -> torch.Tensor:
        return sampling_weights(
            old_per_token_logps,
            rows["sampling_per_token_logps"],
            loss_mask(rows),
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_min,
            self.vllm_importance_sampling_clip_max,
        )

    def _forward(
        self,
        model: Any,
        forward_inputs: tuple[tuple[torch.Tensor, torch.Tensor, int], dict[str, Any]],
        compute_entropy: bool = False,
    ) -> tuple[Any, ...]:
        """Log-probabilities and entropies of a micro-batch's completions, each `(B, C)`."""
        tokens, images = forward_inputs
        return self._get_per_token_logps_and_entropies(model, *tokens, compute_entropy=compute_entropy, **images)

    # Loss

    def _computes_own_loss(self, rollouts: RolloutBuffer) -> bool:
        """Whether the loss is [`ClippedObjective`]; else it is whose method is called."""
        return rollouts.has_only_text and self._why_not_own_loss() is None

    def _why_not_own_loss(self) -> str | None:
        feature = compat.feature_beside_objective(self)
        foreign = None if feature is not None else self._foreign_loss()
        return (feature and f"the loss has {feature}") or (foreign and f"the loss is {foreign}")

    def _foreign_loss(self) -> str | None:
        """Whose the loss is, where it is another one than the one known here."""
        reason = self._overridden_loss()
        if reason is None and (part := compat.foreign_part_of_the_loss(self)):
            reason = f"TRL's, with another {part}"
        if reason is None and (options := compat.unknown_loss_options(self)):
            reason = f"TRL's, with {', '.join(options)}"
        if reason is None and compat.is_clipped_objective(self):
            reason = self._compare_losses()
        return reason

    def _compare_losses(self) -> str | None:
        """What speaks against TRL's loss being [`ClippedObjective`], in made-up rows; once for each kind of loss."""
        args, corrects = self.args, compat.corrects_sampling(self)
        kind = (
            *(self.loss_type, self.importance_sampling_level, self.beta != 0.0, args.use_bias_correction_kl),
            *(args.delta is None, self.off_policy_mask_threshold is None),
            corrects and self.vllm_importance_sampling_mode,
        )
        if kind not in self._compared_losses:
            rows, logps = made_up_micro_batch(self.accelerator.device)
            if corrects:
                weights = self._sampling_weights(rows, rows["old_per_token_logps"])
                if weights.size(1) > 1:  # of padding too
                    weights = weights.masked_fill(rows["completion_mask"] == 0, 1.0)
                rows["importance_sampling_ratio"] = weights
            expected = compat.gradient_of_trls_loss(self, rows, logps)
            with torch.enable_grad():
                loss = self._objective_of(rows, logps, rows["old_per_token_logps"], accumulation=1).loss
            (found,) = torch.autograd.grad(loss, logps)
            if expected[rows["completion_mask"] == 0].any():  # what that is depends on how rows are padded
                raise ValueError(
                    f"loss_type={self.loss_type!r}: TRL {compat.RELEASE} gives padding a gradient with "
                    f"importance_sampling_level={self.importance_sampling_level!r} and beta={self.beta}; later "
                    "releases do not: install one, or choose another loss_type"
                )
            reason = f"TRL {compat.RELEASE}'s {self.loss_type!r}, whose gradient is another one with these settings"
            self._compared_losses[kind] = reason if differ(found, expected) else None
        return self._compared_losses[kind]

    def _overridden_loss(self) -> str | None:
        return compat.foreign_override(self, "compute_loss") or compat.foreign_override(self, "_compute_loss")

    def _report_foreign_loss(self) -> None:
        reason = self._foreign_loss()
        if reason is not None and reason not in self._reported_losses:
            self._reported_losses.add(reason)
            logger.warning(
                f"The loss is {reason}, which this package does not know: completions without a gradient are computed "
                "too, rows stay in their micro-batches, and where it may read them the old policy's log-probabilities "
                "take a forward of their own."
            )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        step = compat.step(self)
        self._loss_logps, self._has_own_statistics, self._is_in_micro_batch = None, False, False
        with compat.recorded_policy_forwards(self, model) as forwards:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._is_in_micro_batch = False
        if self._rollouts is not None:
            self._end_micro_batch(self._rollouts, step, forwards)
        return loss

    def _report_training_step(self) -> None:
        """A training step that takes rows and does not come back here: nothing that follows a micro-batch happens."""
        override = compat.foreign_override(self, "training_step")
        if override is None:
            return  # the one before was broken off
        if extension_setting(self.args, "target_kl") is not None:
            raise ValueError(
                f"target_kl needs {override} to call super().training_step: let it, or set target_kl=None"
            )
        if override not in self._reported_losses:
            self._reported_losses.add(override)
            logger.warning(f"{override} does not call super().training_step: passes are not reported.")

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        rollouts = self._rollouts
        if not self.model.training or rollouts is None:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
            return loss
        step = compat.step(self)
        index = step % self.args.steps_per_generation
        if self._computes_own_loss(rollouts):
            if inputs is rollouts[index] and self._knower_of_micro_batches() is None:
                inputs, forward_inputs = rollouts.trimmed(index), rollouts.forward_inputs(index)
            else:
                forward_inputs = compat.forward_inputs(inputs)
            return self._clipped_loss(model, inputs, forward_inputs, rollouts, step)
        with compat.recorded_policy_forwards(self, model) as forwards:
            loss = super()._compute_loss(model, inputs)
        if forwards and self._overridden_loss() is None:  # TRL's takes one
            self._loss_logps = forwards[0][1]
        return loss

    def _clipped_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        forward_inputs: tuple[tuple[torch.Tensor, torch.Tensor, int], dict[str, Any]],
        rollouts: RolloutBuffer,
        step: int,
    ) -> torch.Tensor:
        index = step % self.args.steps_per_generation
        per_token_logps, entropies, _ = self._forward(model, forward_inputs, compute_entropy=True)
        old_per_token_logps = inputs.get("old_per_token_logps")
        if old_per_token_logps is None:  # the first pass: this policy is the old one
            old_per_token_logps = per_token_logps.detach()
        if compat.corrects_sampling(self) and inputs.get("importance_sampling_ratio") is None:
            inputs = {**inputs, "importance_sampling_ratio": self._sampling_weights(inputs, old_per_token_logps)}
        accumulation = self.current_gradient_accumulation_steps
        num_rows = rollouts.padded_shape[0] if rollouts.is_arranged else None
        output = self._objective_of(
            inputs, per_token_logps, old_per_token_logps, accumulation=accumulation, num_rows=num_rows
        )
        statistics = objective_statistics(
            output,
            per_token_logps.detach() - old_per_token_logps,
            self._is_live(inputs),
            entropies,
            rollouts.left_out(index),
            rollouts.is_placeholder(index),
        )
        self._pass_statistics.observe(statistics, rollouts.iteration(step), replaces_trls=True)
        self._loss_logps, self._has_own_statistics = per_token_logps.detach(), True
        return output.loss if self._divides_by_step_tokens() else output.loss / accumulation

    def _divides_by_step_tokens(self) -> bool:
        return LOSS_TYPES[self.loss_type].normalizer == "step_tokens"

    def _objective_of(
        self,
        inputs: dict[str, Any],
        per_token_logps: torch.Tensor,
        old_per_token_logps: torch.Tensor,
        *,
        accumulation: int,
        num_rows: int | None = None,
    ) -> ObjectiveOutput:
        """The objective of a micro-batch, of which an optimizer step has `accumulation`; see [`ClippedObjective`]."""
        num_tokens = None
        if self._divides_by_step_tokens():
            # of an optimizer step on this process: `num_items_in_batch` counts the generation batch on all of them
            num_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            num_tokens = num_tokens * accumulation / self.args.steps_per_generation
        return self._objective()(
            per_token_logps,
            old_per_token_logps,
            inputs["advantages"],
            loss_mask(inputs),
            inputs.get("ref_per_token_logps"),
            weights=inputs["importance_sampling_ratio"] if compat.corrects_sampling(self) else None,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps"),
            num_rows=num_rows,
            num_tokens=num_tokens,
        )

    def _objective(self) -> ClippedObjective:
        """By the settings as they are now: callbacks change some."""
        args = self.args
        return ClippedObjective(
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            beta=self.beta,
            correct_kl=args.use_bias_correction_kl,
            level=self.importance_sampling_level,
            loss_type=self.loss_type,
            max_completion_length=self.max_completion_length,
            off_policy_threshold=self.off_policy_mask_threshold,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=args.vespo_lambda_pos,
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=args.vespo_lambda_neg,
        )

    def _is_live(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Which rows carry a gradient, `(B,)`: with a KL term all that have a token that counts."""
        if self.beta != 0.0:
            return loss_mask(inputs).bool().any(dim=1)
        is_live = carries_gradient(inputs)
        if self._zero_weight_is_no_gradient() and self._overridden_loss() is None:
            is_live = is_live & has_weight(inputs)
        return is_live

    # What follows a micro-batch

    def _end_micro_batch(
        self, rollouts: RolloutBuffer, step: int, forwards: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Keep the old policy's log-probabilities, look at a loss that was not ours, report, and end a pass.

        Args:
            rollouts ([`RolloutBuffer`]):
                The current rollouts.
            step (`int`):
                Number of micro-batches before this one.
            forwards (`list[tuple[torch.Tensor, torch.Tensor]]`):
                The policy's forwards with a gradient, see [`~compat.recorded_policy_forwards`].
        """
        index, iteration = step % self.args.steps_per_generation, rollouts.iteration(step)
        if not self._has_own_statistics:
            logps = self._loss_logps
            if logps is None:  # a loss of the user's
                logps = logps_of_completions(forwards, rollouts[index])
            self._observe_foreign_loss(rollouts[index], logps, iteration)
        # Where TRL takes no forward for the old policy, it takes each pass for the first; so do we.
        if rollouts.needs_old_logps(index) and compat.takes_old_policy_forward(self) and self._loss_logps is not None:
            self._keep_old_logps(rollouts, index, self._loss_logps)
        self._loss_logps = None
        self._window_position += 1
        if self.accelerator.sync_gradients:
            self._window_position = 0
            self._report_statistics()
        self._report_fullness(rollouts, index)
        if index == self.args.steps_per_generation - 1:
            self._end_pass(iteration, step)

    def _report_fullness(self, rollouts: RolloutBuffer, index: int) -> None:
        """Behind the last micro-batch of an optimizer step: how full those were to which rows were dealt out."""
        window = self._window_within_rollouts()
        if not rollouts.is_arranged or window is None or (index + 1) % window != 0:
            return
        by_prompt = self._arranges_by_prompt(rollouts)
        used = [place for place in range(index + 1 - window, index + 1) if not rollouts.is_placeholder(place)]
        fullest = max((rollouts.num_tokens(place, by_prompt) for place in used), default=1)
        compat.append_metric(self, "update/micro_batches_used", float(len(used)))
        compat.append_metric(self, "update/tokens_of_fullest", float(fullest))

    def _observe_foreign_loss(self, inputs: dict[str, Any], policy_logps: torch.Tensor | None, iteration: int) -> None:
        mask = loss_mask(inputs)
        if policy_logps is None:
            if extension_setting(self.args, "target_kl") is not None:
                raise ValueError(
                    f"target_kl needs the policy's log-probabilities, and the loss of {type(self).__name__} does not "
                    "take those of its micro-batch from _get_per_token_logps_and_entropies: set target_kl=None"
                )
            # other processes may have seen something, and all report together
            self._pass_statistics.observe(nothing_seen(mask.device), iteration, replaces_trls=False)
            return
        old_per_token_logps = inputs.get("old_per_token_logps")
        log_ratio = policy_logps - (policy_logps if old_per_token_logps is None else old_per_token_logps)
        bounds = self.epsilon_low, self.epsilon_high
        clipped = clipped_places(self._surrogate(), torch.exp(log_ratio), column_advantages(inputs), *bounds)
        statistics = micro_batch_statistics(mask, log_ratio, *clipped, self._is_live(inputs))
        self._pass_statistics.observe(statistics, iteration, replaces_trls=False)

    def _report_statistics(self) -> None:
        """Once an optimizer step, where all processes come by together: `log` may be called by one of them alone."""
        gather = self.accelerator.gather
        metrics = self._pass_statistics.report(gather, self._surrogate(), with_reference=self.beta != 0.0)
        metrics.update(self._sampling_statistics.report(gather))
        for name, value in metrics.items():
            compat.append_metric(self, name, value)
        has_no_loss = self._surrogate() == "clipped" and not compat.corrects_sampling(self)
        if metrics.get("iteration/1/clip_ratio") == 0.0 and has_no_loss and not self._has_explained_zeros:
            self._has_explained_zeros = True
            self._explain_zeros()

    def _explain_zeros(self) -> None:
        if self.accelerator.is_main_process:
            logger.logger.warning(  # not accelerate's, which says of everything that it is said by rank 0
                "On the first pass over a batch of rollouts clip_ratio is 0, and the loss without a KL term near 0. "
                "That is right: the policy still is the one that sampled, every ratio is 1, and advantages are 0 on "
                "average; the gradient is not 0."
            )

    def _surrogate(self) -> str:
        """What the loss type maximizes; one that is not known here is taken for a clipped one."""
        return LOSS_TYPES[self.loss_type].surrogate if self.loss_type in LOSS_TYPES else "clipped"

    def _end_pass(self, iteration: int, step: int) -> None:
        """After the last micro-batch of a pass: is there to be another one over these rollouts?"""
        target_kl = extension_setting(self.args, "target_kl")
        sums = self._pass_statistics.end_pass()
        is_last = (step + 1) % (self.args.steps_per_generation * self.num_iterations) == 0
        stops = False
        if target_kl is not None and sums is not None:
            tokens, kl = self.accelerator.reduce(sums, reduction="sum").tolist()  # the same on all processes
            stops = exceeds_target(kl, tokens, target_kl)
        if stops or is_last:
            compat.append_metric(self, "rollouts/iterations_used", float(iteration))
            compat.set_buffered_micro_batches(self, None)

    def log(self, *args: Any, **kwargs: Any) -> None:
        # What could not be measured (a reward function that scored nothing): trackers stumble over `None`.
        compat.drop_metrics_without_value(self)
        super().log(*args, **kwargs)

    # Checkpoints

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._foreign_loss()  # a loss that is refused is refused before anything is generated
        # A run that was broken off in an optimizer step leaves its counter there, and begins one anew.
        self._window_position, self._is_in_micro_batch = 0, False
        is_arranged = self._rollouts is not None and self._rollouts.is_arranged
        if is_arranged and compat.step(self) % (self._window_within_rollouts() or 1) != 0:
            compat.set_buffered_micro_batches(self, None)
        if self.state.global_step >= max_steps:  # transformers looks at this behind a step, and would take one more
            return num_train_epochs, 0
        if resume_from_checkpoint is None or has_length(self.train_dataset):
            return epochs, batches
        # Of a stream, which has no length, transformers takes all steps for steps of the first epoch. How many batches
        # of the present one have been taken is in the epoch that it has saved, as a share of all the run's batches.
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        epochs = int(saved.epoch or 0)
        if not self.args.ignore_data_skip:
            share = (saved.epoch or 0) - epochs
            batches = round(share * saved.max_steps * self.args.gradient_accumulation_steps)
        return epochs, batches

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before the rest: the trainer's state, which makes a folder a checkpoint, is written last.
        if extension_setting(self.args, "save_rollouts"):
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
            pass_sums = self._pass_statistics.pass_sums
            state = {
                "step": compat.step(self),
                "global_step": self.state.global_step,
                "settings": self._rollout_settings(),
                "pass_sums": None if pass_sums is None else pass_sums.tolist(),
            }
            unwritable = None if self._rollouts is None else self._rollouts.find_unwritable()
            if is_so_anywhere(self.accelerator, unwritable is not None):
                logger.warning(f"The checkpoint is without rollouts, which hold what a file cannot ({unwritable}).")
            elif self._rollouts is None:
                save_no_rollouts(folder / FOLDER, rank, num_ranks, state)
            else:
                self._rollouts.save(folder / FOLDER, rank, num_ranks, state)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollouts(Path(checkpoint) / FOLDER)

    def _load_rollouts(self, folder: Path) -> None:
        self._pass_statistics, self._sampling_statistics = PassStatistics(), SamplingStatistics()
        self._window_position = 0
        compat.set_buffered_micro_batches(self, None)
        # TRL would count from 0, and then generate in the middle of the passes over a batch of prompts.
        compat.set_step(self, self.state.global_step * self.args.gradient_accumulation_steps)
        # The sampler draws the order of prompts when an epoch begins, each from the generator that the one before has
        # left. Transformers goes to the place in the epoch, but would go there in the first epoch's order. A stream
        # has no sampler: its order depends on the number of the epoch alone.
        if self._train_sampler is not None:
            for _ in range(int(self.state.epoch or 0)):
                next(iter(self._train_sampler), None)
        rollouts, state, why_not = load_matching_rollouts(
            folder,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.accelerator.device,
            global_step=self.state.global_step,
            settings=self._rollout_settings(),
        )
        # All processes generate, or none does.
        if is_so_anywhere(self.accelerator, state is None) or state is None:
            logger.warning(f"{why_not or 'Another process has no rollouts'}: going on with fresh ones.")
            return
        compat.set_step(self, state["step"])
        compat.set_buffered_micro_batches(self, rollouts)
        if state["pass_sums"] is not None:
            self._pass_statistics.pass_sums = torch.tensor(state["pass_sums"], device=self.accelerator.device)

    def _rollout_settings(self) -> dict[str, Any]:
        """All on which the rows of the current rollouts depend, to be compared when a run is resumed."""
        return {
            **rollout_settings(self.args),
            "rewards": ", ".join(self.reward_func_names),
            "weights of the rewards": self.reward_weights.tolist(),
            "loss": self._foreign_loss() or "TRL's",
        }
