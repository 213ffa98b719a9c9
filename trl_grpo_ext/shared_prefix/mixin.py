"""`SharedPrefixMixin`: log-probabilities from a packed row in which each prompt stands once."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing

from .. import compat
from ..config import check_settings, extension_setting
from ..mixin_order import OrderedMixin
from ..ranks import is_so_anywhere
from ..rollouts import RolloutBuffer
from .attention import Segments, attend_over_segments, why_not_wrapped
from .layout import LayoutError, PackedLayout, packed_layout
from .prefill import shared_prefill
from .probe import (
    computes_in_half_precision,
    difference_of_gradients,
    difference_of_logps,
    made_up_rows,
    undisturbed,
    whole_parameters,
)


logger = get_logger(__name__)

AUXILIARY_LOSS = "the MoE auxiliary loss counts each prompt once for each of its completions"


class SharedPrefixMixin(OrderedMixin):
    """A shared prompt computed once, and no padding, for any `trl.GRPOTrainer`.

    Policy, old-policy and reference forwards go through one packed row for each micro-batch (see
    [`trl_grpo_ext.shared_prefix.layout`]). Log-probabilities, entropies and gradients are those of TRL's padded one.

    `shared_prefix="auto"` falls back to the padded forward, and says once why, where a model or a batch cannot be
    packed: images, eager attention or one of the user's own, sliding windows that are shorter than a row, soft-capped
    scores, attention sinks, recurrent layers, a position scaling that depends on the row's length, a MoE auxiliary
    loss, an activated LoRA, NEFTune, whose noise depends on the row's length too. `"on"` raises instead, at
    construction where that is known by then; `"off"` never packs.

    Before the first use a few short rows are computed both ways, which finds models that behave in another way without
    saying so: their log-probabilities, and the gradients of all parameters. Where processes hold parts of parameters
    only (ZeRO-3, FSDP) the gradients cannot be compared by this.

    The policy and the trainer's reference model are packed. Any other model that is handed to the forward, a teacher,
    is computed from padded rows. No model is changed by this: see [`trl_grpo_ext.shared_prefix.attention`].

    Metrics: `update/tokens`, the tokens of the policy's forwards in an optimizer step, and `update/tokens_padded`,
    those that TRL would have computed; both on this process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_settings(self.args)
        setting = extension_setting(self.args, "shared_prefix")
        self._packs: bool | None = False if setting == "off" else None
        self.why_padded: str | None = "shared_prefix is 'off'" if setting == "off" else None  # known with `packs`
        self._packed_models: WeakSet[nn.Module] = WeakSet()  # those that were compared
        self._inner_models: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
        self._reported_obstacles: set[str] = set()
        self._tokens_of_step: list[tuple[int, int]] = []  # of each forward, computed and as TRL pads them
        if setting == "on" and (obstacle := self._find_obstacle()) is not None:
            self._report_obstacle(obstacle)

    @property
    def packs(self) -> bool:
        """Whether micro-batches are computed as packed rows; decided when first asked, by all processes together."""
        if self._packs is None:
            obstacle = self._of_any_process(self._find_obstacle())
            if obstacle is None:
                obstacle = self._of_any_process(self._compare_forwards())
            self._packs, self.why_padded = obstacle is None, obstacle
            if obstacle is not None:
                self._report_obstacle(obstacle)
            else:
                for model in self._own_models():
                    self._packed_models |= {model, _language_model(model)}
        return self._packs

    @property
    def fast_paths(self) -> dict[str, str]:
        """What of this mixin is on, or why not, as far as that is known by now."""
        reasons = "; ".join(sorted(self._reported_obstacles)) or "shared_prefix='off'"
        found = "not known yet" if self._packs is None else "on" if self._packs else f"off: {reasons}"
        if self._packs and self._reported_obstacles:
            found = f"on, but for some rows: {reasons}"
        return {**getattr(super(), "fast_paths", {}), "packed_rows": found}

    def packs_rows_of(self, num_tokens: int) -> bool:
        """Whether rows of so many tokens are computed as packed rows."""
        if not self.packs:
            return False
        window = _shortest_sliding_window(self._unwrapped(self.model).config)
        return window is None or num_tokens <= window

    def _unwrapped(self, model: Any) -> Any:
        """A model without what training puts around it; adapters stay."""
        if not isinstance(model, nn.Module):
            return model
        found = self._inner_models.get(model)
        inner = None if found is None else found()
        if inner is None:  # accelerate takes milliseconds
            inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            self._inner_models[model] = ref(inner)
        return inner

    def _own_models(self) -> list[Any]:
        """Policy and reference model, unwrapped."""
        return [self._unwrapped(model) for model in (self.model, self.ref_model) if model is not None]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not self.packs:
            return super()._generate_and_score_completions(inputs)
        with shared_prefill(_language_model(self._unwrapped(self.model))):
            return super()._generate_and_score_completions(inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if self.packs and self._unwrapped(model) in self._packed_models:
            obstacle = self._obstacle_of_call(model, compute_aux_loss, kwargs)
            if obstacle is None:
                try:
                    return self._packed_forward(
                        model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy
                    )
                except LayoutError as error:
                    obstacle = str(error)
            self._report_obstacle(obstacle)
        self._count_tokens(model, input_ids, input_ids.numel())
        return super()._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            compute_aux_loss=compute_aux_loss,
            **kwargs,
        )

    def _obstacle_of_call(self, model: Any, compute_aux_loss: bool, inputs: dict[str, Any]) -> str | None:
        if compute_aux_loss:
            return AUXILIARY_LOSS
        if any(value is not None for value in inputs.values()):
            return "there are images"
        # which can be set at any time
        return why_not_wrapped(compat.attention_name(_language_model(self._unwrapped(model))))

    def _packed_forward(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_completion_tokens: int,
        batch_size: int | None,
        compute_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        window = _shortest_sliding_window(_language_model(self._unwrapped(model)).config)
        parts = self._laid_out(input_ids, attention_mask, num_completion_tokens, batch_size)
        longest = max(layout.longest_sequence for _, layout in parts)
        if window is not None and longest > window:
            raise LayoutError(f"the sliding window of {window} tokens is shorter than the longest row, {longest}")
        logps, entropies = [], []
        for ids, layout in parts:
            self._count_tokens(model, ids, layout.num_tokens)
            logps_of_row, entropies_of_row = self._forward_of_packed_row(model, ids, layout, compute_entropy)
            logps.append(layout.unpack(logps_of_row[0]))
            if entropies_of_row is not None:
                entropies.append(layout.unpack(entropies_of_row[0]))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _laid_out(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_completion_tokens: int, batch_size: int | None
    ) -> list[tuple[torch.Tensor, PackedLayout]]:
        """The rows that are packed together and their layout: of a micro-batch of rollouts, as it was made before."""
        rollouts = compat.buffered_micro_batches(self)
        rows_at_once = batch_size or input_ids.size(0)
        if isinstance(rollouts, RolloutBuffer) and rows_at_once >= input_ids.size(0):
            known = rollouts.layout_of(input_ids)
            if known is not None and known.shape == (*input_ids.shape, num_completion_tokens):
                return [(input_ids, known)]
        return [
            (ids, packed_layout(ids, mask, num_completion_tokens))
            for ids, mask in zip(input_ids.split(rows_at_once), attention_mask.split(rows_at_once), strict=True)
        ]

    def _forward_of_packed_row(
        self, model: Any, input_ids: torch.Tensor, layout: PackedLayout, compute_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies of a packed row's scored places, `(1, S)`; nothing here waits for a GPU."""
        language_model = _language_model(self._unwrapped(model))
        attend_over_segments(compat.attention_name(language_model))
        segments = Segments(layout)
        labels = layout.labels(input_ids).unsqueeze(0)
        inputs: dict[str, Any] = {
            "input_ids": layout.pack(input_ids),
            "position_ids": layout.position_ids.unsqueeze(0),
            # With no mask, or one for each token, transformers would make one of N x N. A mask of four
            # dimensions is handed on as it is; the attention takes the segments instead.
            "attention_mask": input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
            "segments": segments,
        }
        log_probs: torch.Tensor
        with _scored_places_only(language_model.base_model):
            if compat.HAS_SCORING_HEAD:
                with self.accelerator.autocast(), compat.every_row_scored():
                    outputs = model(**inputs, shift_labels=labels, fused_lm_head=True)
                log_probs, entropies = outputs.log_probs, outputs.entropy if compute_entropy else None
            else:
                logits = model(**inputs, use_cache=False).logits
                log_probs, entropies = compat.scores_of_logits(self, logits, labels, compute_entropy)
        if self._packs is None and segments.num_uses == 0:  # of the rows that are compared, before any other
            raise RuntimeError("no attention layer was given the segments of the packed row")
        return log_probs, entropies

    def _count_tokens(self, model: Any, input_ids: torch.Tensor, num_computed: int) -> None:
        is_policy = self._unwrapped(model) is self._unwrapped(self.model)
        if is_policy and self.model.training and torch.is_grad_enabled():
            rollouts = compat.buffered_micro_batches(self)
            shape = rollouts.padded_shape if isinstance(rollouts, RolloutBuffer) else input_ids.shape
            self._tokens_of_step.append((num_computed, math.prod(shape)))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self._tokens_of_step:
            computed, padded = map(sum, zip(*self._tokens_of_step, strict=True))
            self._tokens_of_step.clear()
            compat.append_metric(self, "update/tokens", float(computed))
            compat.append_metric(self, "update/tokens_padded", float(padded))
        return loss

    # Whether to pack

    def _find_obstacle(self) -> str | None:
        """What speaks against packing, as far as settings and configurations say it."""
        if compat.has_noise_on_embeddings(self):
            return "NEFTune's noise depends on the length of the row (neftune_noise_alpha)"
        return next(filter(None, map(find_obstacle, self._own_models())), None)

    def _compare_forwards(self) -> str | None:
        """What speaks against packing in a few made-up rows, computed padded and packed."""
        padded_forward = super()._get_per_token_logps_and_entropies
        device = self.accelerator.device
        ids, mask, width = made_up_rows(self._unwrapped(self.model).config.vocab_size)
        ids, mask = ids.to(device), mask.to(device)
        found = None
        for model in (self.model, self.ref_model):
            if model is None:
                continue
            is_half = computes_in_half_precision(model, self.accelerator.mixed_precision)
            parameters = whole_parameters(model) if model is self.model else {}
            with (
                undisturbed(model, device),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                torch.inference_mode(False),
                torch.compiler.set_stance("force_eager"),  # to compile for made-up rows would take minutes
                torch.set_grad_enabled(bool(parameters)),
            ):
                is_token = mask[:, -width:].bool()
                # whatever a release gives for padding
                padded = padded_forward(model, ids, mask, width)[0].masked_fill(~is_token, 0.0)
                try:
                    packed = self._packed_forward(model, ids, mask, width, None, False)[0]
                    obstacle = difference_of_logps(packed, padded, is_token, is_half)
                    if obstacle is None and parameters:
                        obstacle = difference_of_gradients(packed, padded, parameters, is_half)
                except Exception as error:  # models of others: whatever they raise, they cannot be packed
                    obstacle = f"a packed forward fails ({type(error).__name__}: {error})"
            found = found or obstacle  # and on to the next model, because other processes go on to it
        return found

    def _of_any_process(self, obstacle: str | None) -> str | None:
        """An obstacle of this process or, if it has none, of another one."""
        if is_so_anywhere(self.accelerator, obstacle is not None):
            return obstacle or "another process cannot pack"
        return None

    def _report_obstacle(self, obstacle: str) -> None:
        if extension_setting(self.args, "shared_prefix") == "on":
            raise ValueError(
                f"shared_prefix='on', but rows cannot be packed: {obstacle}. Set 'auto' to train with padded rows"
            )
        if obstacle not in self._reported_obstacles:
            self._reported_obstacles.add(obstacle)
            logger.warning(f"Rows are padded, and prompts computed once for each completion: {obstacle}.")


@contextmanager
def _scored_places_only(backbone: nn.Module) -> Iterator[None]:
    """Within it a packed row's last hidden states are those of the scored places: the LM head sees no others."""
    hook = backbone.register_forward_hook(_keep_scored_places, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _keep_scored_places(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    output.last_hidden_state = kwargs["segments"].layout.scored(output.last_hidden_state)
    return output


def _language_model(model: Any) -> PreTrainedModel:
    """The model itself, without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_obstacle(model: Any) -> str | None:
    """Why a model's rows cannot be packed, as far as its configuration says; `None` if nothing speaks against it."""
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            return f"{adapter.peft_type.value} puts tokens of its own before each row"
        if getattr(adapter, "alora_invocation_tokens", None):
            return "an activated LoRA looks for its invocation tokens once in each row (alora_invocation_tokens)"
    model = _language_model(model)
    config = model.config
    if config.get_text_config() is not config:
        return f"{type(model).__name__} takes more than text"
    if (obstacle := why_not_wrapped(compat.attention_name(model))) is not None:
        return obstacle
    layer_types = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if layer_types or compat.carries_state_along_rows(model):
        return f"there are layers that carry a state along the row ({', '.join(sorted(layer_types)) or 'recurrent'})"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "attention scores are soft-capped"
    if getattr(config, "output_router_logits", False):
        return AUXILIARY_LOSS
    if any(hasattr(module, "sinks") for module in model.modules()):
        return "there are attention sinks"
    scaling = getattr(config, "rope_parameters", None) or {}
    kinds = {scaling.get("rope_type"), *(part.get("rope_type") for part in scaling.values() if isinstance(part, dict))}
    if kinds & {"dynamic", "longrope"}:
        return "the scaling of positions depends on the length of the row"
    return None


def _shortest_sliding_window(config: Any) -> int | None:
    """The window of the model's sliding layers, in tokens; `None` if it has none."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return getattr(config, "sliding_window", None)
    return None
