"""`SharedPrefixMixin`: log-probabilities from a packed row in which each prompt stands once."""

import math
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel
from trl.models.utils import disable_gradient_checkpointing

from .. import compat
from ..config import check_settings, extension_setting
from ..mixin_order import OrderedMixin
from ..rollouts import RolloutBuffer
from .attention import STOCK, Segments, use_shared_prefix_attention
from .layout import LayoutError, packed_layout
from .prefill import shared_prefill


logger = get_logger(__name__)

# Largest difference of log-probabilities, in nats, between a packed and a padded forward in fp32; and the largest mean
# difference in half precision, where single tokens differ by as much as two padded forwards do.
TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-3, 0.05


class SharedPrefixMixin(OrderedMixin):
    """A shared prompt computed once, and no padding, for any `trl.GRPOTrainer`.

    Policy, old-policy and reference forwards go through one packed row for each micro-batch (see
    [`trl_grpo_ext.shared_prefix.layout`]). Log-probabilities, entropies and gradients are those of TRL's padded one.

    `shared_prefix="auto"` falls back to the padded forward, and says once why, where a model or a batch cannot be
    packed: images, an attention implementation other than `"sdpa"`, sliding windows that are shorter than a row,
    soft-capped scores, attention sinks, recurrent layers, a position scaling that depends on the row's length, a MoE
    auxiliary loss. `"on"` raises instead, `"off"` never packs. Before the first use a few short rows are computed both
    ways, which finds models that behave in another way without saying so.

    Metrics: `update/tokens_computed`, the tokens of a micro-batch's forward, and `update/tokens_padded`, those that
    TRL would have computed; both on this process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_settings(self.args)
        self._packs: bool | None = False if extension_setting(self.args, "shared_prefix") == "off" else None
        self._reported_obstacles: set[str] = set()

    @property
    def packs(self) -> bool:
        """Whether micro-batches are computed as packed rows; decided when first asked, by all processes together."""
        if self._packs is None:
            obstacle = find_obstacle(self.accelerator.unwrap_model(self.model)) or self._compare_forwards()
            self._packs = obstacle is None
            if obstacle is not None:
                self._report_obstacle(obstacle)
        return self._packs

    def packs_rows_of(self, num_tokens: int) -> bool:
        """Whether rows of so many tokens are computed as packed rows."""
        window = _shortest_sliding_window(self.accelerator.unwrap_model(self.model).config)
        return self.packs and (window is None or num_tokens <= window)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not self.packs:
            return super()._generate_and_score_completions(inputs)
        with shared_prefill(_language_model(self.accelerator.unwrap_model(self.model))):
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
        obstacle = None
        if compute_aux_loss:
            obstacle = "the MoE auxiliary loss counts each prompt once for each of its completions"
        elif any(value is not None for value in kwargs.values()):
            obstacle = "there are images"
        if self.packs and obstacle is None:
            try:
                return self._packed_forward(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy
                )
            except LayoutError as error:
                obstacle = str(error)
        if self.packs and obstacle is not None:
            self._report_obstacle(obstacle)
        self._count_tokens(input_ids, input_ids.numel())
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

    def _packed_forward(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_completion_tokens: int,
        batch_size: int | None,
        compute_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        window = _shortest_sliding_window(self.accelerator.unwrap_model(model).config)
        rows_at_once = batch_size or input_ids.size(0)
        parts = [
            (ids, packed_layout(ids, mask, num_completion_tokens))
            for ids, mask in zip(input_ids.split(rows_at_once), attention_mask.split(rows_at_once), strict=True)
        ]
        longest = max(layout.longest_sequence for _, layout in parts)
        if window is not None and longest > window:
            raise LayoutError(f"the sliding window of {window} tokens is shorter than the longest row, {longest}")
        logps, entropies = [], []
        for ids, layout in parts:
            self._count_tokens(ids, layout.num_tokens)
            with self.accelerator.autocast():
                outputs = model(
                    input_ids=layout.pack(ids),
                    position_ids=layout.position_ids.unsqueeze(0),
                    # With no mask, or one for each token, transformers would make one of N x N. A mask of four
                    # dimensions is handed on as it is; the attention takes the segments instead.
                    attention_mask=ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
                    shift_labels=layout.labels(ids).unsqueeze(0),
                    fused_lm_head=True,
                    segments=Segments(layout),
                )
            logps.append(layout.unpack(outputs.log_probs[0]))
            if compute_entropy:
                entropies.append(layout.unpack(outputs.entropy[0]))
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    def _count_tokens(self, input_ids: torch.Tensor, num_computed: int) -> None:
        if self.model.training and torch.is_grad_enabled():
            rollouts = compat.buffered_micro_batches(self)
            shape = rollouts.padded_shape if isinstance(rollouts, RolloutBuffer) else input_ids.shape
            compat.append_metric(self, "update/tokens_computed", float(num_computed))
            compat.append_metric(self, "update/tokens_padded", float(math.prod(shape)))

    # Whether to pack

    def _compare_forwards(self) -> str | None:
        """Compute a few short rows padded and packed; what speaks against packing, on any process."""
        models = [_language_model(self.accelerator.unwrap_model(self.model))]
        if self.ref_model is not None:
            models.append(_language_model(self.accelerator.unwrap_model(self.ref_model)))
        ids, mask, width = _made_up_rows(models[0].config.vocab_size)
        ids, mask = ids.to(self.accelerator.device), mask.to(self.accelerator.device)
        forward = super()._get_per_token_logps_and_entropies
        was_training = self.model.training
        self.model.eval()  # no dropout
        obstacle = None
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            padded = forward(self.model, ids, mask, width)[0]
            for model in models:
                use_shared_prefix_attention(model)
                model.base_model.register_forward_hook(_keep_scored_places, with_kwargs=True)
            try:
                still_padded = forward(self.model, ids, mask, width)[0]
                packed = self._packed_forward(self.model, ids, mask, width, None, False)[0]
            except Exception as error:  # models of others: whatever they raise, they cannot be packed
                obstacle = f"a packed forward fails ({type(error).__name__}: {error})"
            else:
                differences = torch.maximum((packed - padded).abs(), (still_padded - padded).abs())
                differences = differences[mask[:, -width:].bool()]
                is_half = self._computes_in_half_precision()
                difference = float(differences.mean() if is_half else differences.max())
                tolerance = HALF_PRECISION_TOLERANCE if is_half else TOLERANCE
                if not difference <= tolerance:
                    obstacle = (
                        f"log-probabilities of a packed forward differ by {difference:.2g} nats from those of a "
                        f"padded one (tolerance {tolerance})"
                    )
        self.model.train(was_training)
        obstacles = torch.tensor([float(obstacle is not None)], device=self.accelerator.device)
        if self.accelerator.reduce(obstacles, reduction="sum").item() > 0:
            for model in models:
                use_shared_prefix_attention(model, STOCK)
            return obstacle or "another process cannot pack"
        return None

    def _computes_in_half_precision(self) -> bool:
        return self.accelerator.mixed_precision != "no" or any(
            parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self.model.parameters()
        )

    def _report_obstacle(self, obstacle: str) -> None:
        if extension_setting(self.args, "shared_prefix") == "on":
            raise ValueError(
                f"shared_prefix='on', but rows cannot be packed: {obstacle}. Set 'auto' to train with padded rows"
            )
        if obstacle not in self._reported_obstacles:
            self._reported_obstacles.add(obstacle)
            logger.warning(f"Rows are padded, and prompts computed once for each completion: {obstacle}.")


def _made_up_rows(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A few short rows, two for each prompt, as TRL lays them out: token ids, mask, columns of the completions."""
    # which prompt, its length, and the completion's length
    rows = ((0, 9, 7), (1, 3, 12), (0, 9, 12), (1, 3, 1))
    width = 12
    ids = torch.randint(vocab_size, (len(rows), width + width), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, (prompt, prompt_tokens, completion_tokens) in enumerate(rows):
        ids[row, :width] = ids[prompt, :width]
        mask[row, width - prompt_tokens : width + completion_tokens] = 1
    return ids, mask, width


def _keep_scored_places(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Leave the last hidden states of the scored places only: off a GPU the LM head scores all that it gets."""
    segments = kwargs.get("segments")
    if segments is not None:
        output.last_hidden_state = output.last_hidden_state[:, segments.layout.scored]
    return output


def _language_model(model: Any) -> PreTrainedModel:
    """The model itself, without an adapter around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def find_obstacle(model: Any) -> str | None:
    """Why a model's rows cannot be packed, as far as its configuration says; `None` if nothing speaks against it."""
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            return f"{adapter.peft_type.value} puts tokens of its own before each row"
    model = _language_model(model)
    config = model.config
    if config.get_text_config() is not config:
        return f"{type(model).__name__} takes more than text"
    if config._attn_implementation != STOCK:
        return f"attn_implementation is {config._attn_implementation!r}, and only {STOCK!r} can be packed"
    layer_types = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if layer_types or getattr(model, "_is_stateful", False):
        return f"there are layers that carry a state along the row ({', '.join(sorted(layer_types)) or 'recurrent'})"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "attention scores are soft-capped"
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
