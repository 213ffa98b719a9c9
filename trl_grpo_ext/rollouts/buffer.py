"""`RolloutBuffer`: the rows of one generation batch, while the update passes over them."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch

from .. import compat
from ..metrics import LeftOut
from ..shared_prefix.layout import PackedLayout, lay_out, on_device, to_device
from .arrange import even_shares, fewest_padded_shares, fewest_shares_by_prompt, packed_tokens, shares_by_prompt
from .exchange import ExchangeFigures, Ranks, balance
from .files import FORMAT, RolloutError, read_rollouts, rollout_files, write_rollouts
from .rows import (
    EMPTY_ROW,
    MicroBatch,
    RowOnHost,
    carries_gradient,
    concatenate,
    empty_row,
    has_weight,
    kinds_of,
    loss_mask,
    num_rows,
    on_host,
    rows_on_host,
    select,
)


class _Deal(NamedTuple):
    """Rows, and which of them each micro-batch gets."""

    rows: MicroBatch
    known: Sequence[RowOnHost]
    shares: Mapping[int, Sequence[int]]


class RolloutBuffer(Sequence[MicroBatch]):
    """Micro-batches of rollouts, in the order in which each pass takes them.

    A micro-batch is the dictionary that TRL makes: `prompt_ids` and `prompt_mask` of shape `(B, P)`, `completion_ids`
    and `completion_mask` of shape `(B, C)`, `advantages` of shape `(B,)` or `(B, C)`, and what else it needs. All of a
    batch are padded to the same `P` and `C`.

    Args:
        micro_batches (`Sequence[dict]`):
            One dictionary for each micro-batch.
        start_step (`int`, *optional*, defaults to `0`):
            Number of micro-batches trained on when the rollouts were made.

    Attributes:
        has_only_text (`bool`):
            Whether each value is a tensor with an entry a row, so that rows can be moved (images have other shapes).
            Where other processes have images it is set to `False` here too.
        is_arranged (`bool`):
            Whether [`~RolloutBuffer.arrange`] has dealt the rows out anew.
        skips_rows_without_weight (`bool`):
            Whether rows without a weight are left out, if there are any; as `is_arranged` the same on all processes.
        padded_shape (`tuple[int, int]`):
            Rows and tokens of a row, padding included, of a micro-batch as TRL made it.
        padded_tokens (`int`):
            Tokens of such a micro-batch; of the largest of any process where rows have moved between them.
        exchange ([`ExchangeFigures`] or `None`):
            What it took to move rows between processes, if that was done.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], start_step: int = 0) -> None:
        self._micro_batches = [dict(micro_batch) for micro_batch in micro_batches]
        self.start_step = start_step
        self.is_arranged = self.skips_rows_without_weight = False
        self.has_only_text = all(
            isinstance(value, torch.Tensor) and (value.ndim == 0 or value.size(0) == num_rows(micro_batch))
            for micro_batch in self._micro_batches
            for value in micro_batch.values()
        ) and not any("pixel" in key or "token_type" in key for key in self._micro_batches[0])
        first = self._micro_batches[0]
        self.padded_shape = (num_rows(first), first["prompt_ids"].size(1) + first["completion_ids"].size(1))
        self.padded_tokens = math.prod(self.padded_shape)
        self.exchange: ExchangeFigures | None = None
        self._empty: set[int] = set()  # micro-batches that hold a placeholder
        self._left_out: dict[int, LeftOut] = {}  # by the first micro-batch of the optimizer step they belong to
        # Found once, because the host waits for the device then; see `_rows_on_host`, `forward_inputs`, `layout_of`.
        self._known: list[list[RowOnHost]] | None = None
        self._forward_inputs: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._layouts: dict[int, PackedLayout] | None = None

    def __len__(self) -> int:
        return len(self._micro_batches)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MicroBatch]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._micro_batches[index]

    def trimmed(self, index: int) -> MicroBatch:
        """Micro-batch `index` without the last columns in which every row is padded, which no other token sees."""
        micro_batch = self._micro_batches[index]
        kinds, used = kinds_of(micro_batch), self._used_columns(index)
        return {
            key: value[:, :used] if kinds.get(key) == "completion" else value for key, value in micro_batch.items()
        }

    def _used_columns(self, index: int) -> int:
        return max([1, *(row.used_columns for row in self._rows_on_host()[index])])

    def _rows_on_host(self) -> list[list[RowOnHost]]:
        """What the host knows of the rows of each micro-batch: when first asked, by one copy for all of them."""
        if self._known is None:
            self._known, _ = self._copied_to_host()
        return self._known

    def _copied_to_host(
        self, *functions: Callable[[MicroBatch], torch.Tensor]
    ) -> tuple[list[list[RowOnHost]], list[list[torch.Tensor]]]:
        """What is to be known of rows, and what functions say of them, `(B,)`, for each micro-batch: one copy."""
        names = "prompt_ids", "prompt_mask", "completion_mask"
        copies = on_host(
            [
                tensor
                for rows in self._micro_batches
                for tensor in (*(rows[name] for name in names), *(function(rows) for function in functions))
            ]
        )
        size = len(names) + len(functions)
        of_batches = [copies[start : start + size] for start in range(0, len(copies), size)]
        return [rows_on_host(*copy[: len(names)]) for copy in of_batches], [copy[len(names) :] for copy in of_batches]

    # Forwards

    def forward_inputs(self, index: int) -> tuple[tuple[torch.Tensor, torch.Tensor, int], dict[str, Any]]:
        """What the forward of micro-batch `index` is called with, see [`~compat.forward_inputs`], trimmed.

        The same tensors in each pass, by which [`~RolloutBuffer.layout_of`] knows them, until rows are moved.
        """
        if not self.has_only_text:
            return compat.forward_inputs(self._micro_batches[index])
        if index not in self._forward_inputs:
            self._forward_inputs[index], _ = compat.forward_inputs(self.trimmed(index))
        return self._forward_inputs[index], {}

    def layout_of(self, input_ids: torch.Tensor) -> PackedLayout | None:
        """The way of a micro-batch's rows into a packed row, made once for all passes and all micro-batches.

        Args:
            input_ids (`torch.Tensor`):
                Tokens, `(B, T)`.

        Returns:
            `PackedLayout` or `None`:
                On the device of the rows; `None` if these are not the very tokens that
                [`~RolloutBuffer.forward_inputs`] has handed out, or cannot be packed.
        """
        handed_out = (index for index, (ids, _, _) in self._forward_inputs.items() if ids is input_ids)
        index = next(handed_out, None)
        if index is None:
            return None
        if self._layouts is None:
            self._layouts = self._lay_out(input_ids.device)
        return self._layouts.get(index)

    def _lay_out(self, device: torch.device) -> dict[int, PackedLayout]:
        """The layouts of all micro-batches that can be packed: one copy to the device, which nobody waits for."""
        layouts = {}
        for index, (micro_batch, known) in enumerate(zip(self._micro_batches, self._rows_on_host(), strict=True)):
            rows = [row.row for row in known if row.row is not None]
            if len(rows) == len(known):
                layouts[index] = lay_out(rows, micro_batch["prompt_ids"].size(1), self._used_columns(index))
        return dict(zip(layouts, on_device(list(layouts.values()), device), strict=True))

    def num_tokens(self, index: int, by_prompt: bool) -> int:
        """Tokens of the forward of micro-batch `index`: of a packed row, or of rows padded to the longest."""
        known = self._rows_on_host()[index]
        rows = [row.row for row in known if row.row is not None]
        if by_prompt and len(rows) == len(known):
            return packed_tokens(rows)
        return len(known) * (self._micro_batches[index]["prompt_ids"].size(1) + self._used_columns(index))

    def iteration(self, step: int) -> int:
        """Which pass over the rollouts the micro-batch of a step belongs to, from 1."""
        return step // len(self) - self.start_step // len(self) + 1

    def micro_batches_until(self, index: int) -> int:
        """How many micro-batches are trained on between the generation and the first pass of micro-batch `index`."""
        return (index - self.start_step) % len(self)

    @property
    def num_skipped(self) -> int:
        """Rows that are left out for want of an advantage or a token that counts."""
        return sum(left_out.rows for left_out in self._left_out.values())

    @property
    def num_without_weight(self) -> int:
        """Other rows, which are left out for want of a weight."""
        return sum(left_out.rows_without_weight for left_out in self._left_out.values())

    @property
    def skips_rows(self) -> bool:
        """Whether rows without a gradient are left out, if there are any."""
        return bool(self._left_out)

    def left_out(self, index: int) -> LeftOut:
        """The rows that were left out of micro-batch `index`."""
        return self._left_out.get(index, LeftOut())

    def is_placeholder(self, index: int) -> bool:
        """Whether micro-batch `index` got no row, and holds something to compute in place of one."""
        return index in self._empty

    # Old policy

    def needs_old_logps(self, index: int) -> bool:
        """Whether the old policy's log-probabilities of a micro-batch are still missing."""
        return self._micro_batches[index].get("old_per_token_logps") is None

    def set_old_logps(self, index: int, per_token_logps: torch.Tensor) -> None:
        """Keep log-probabilities, `(B, C)` or without the last columns where all rows are padded."""
        micro_batch = self._micro_batches[index]
        old = torch.zeros_like(micro_batch["completion_ids"], dtype=per_token_logps.dtype)
        old[:, : per_token_logps.size(1)] = per_token_logps.detach()
        micro_batch["old_per_token_logps"] = old

    def set_weights(self, index: int, weights: torch.Tensor) -> None:
        """Keep what the completions of a micro-batch weigh, `(B, C)` or `(B, 1)`, where TRL's loss reads it."""
        self._micro_batches[index]["importance_sampling_ratio"] = weights

    # Rows

    def arrange(
        self,
        window: int,
        *,
        skip_zero_advantage: bool,
        by_prompt: bool,
        skip_zero_weight: bool = False,
        most_tokens: int | Literal["auto"] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Deal the rows of each optimizer step out to its micro-batches anew, and to processes if these are given.

        A micro-batch that gets no row keeps one of a single prompt token and a single completion token that does not
        count: its loss is 0, and it takes part in every forward, backward and collective call.

        Args:
            window (`int`):
                Micro-batches of an optimizer step. Rows stay within consecutive runs of so many micro-batches.
            skip_zero_advantage (`bool`):
                Leave out the rows whose gradient is 0.
            by_prompt (`bool`):
                Bring the rows of a prompt together, for a forward that computes the prompt once; no micro-batch gets
                more tokens than one had with padding. Otherwise micro-batches get equally many rows.
            skip_zero_weight (`bool`, *optional*, defaults to `False`):
                Then also leave out those without a weight, as far as weights are known.
            most_tokens (`int` or `"auto"`, *optional*):
                Deal the rows out to as few micro-batches as can be with at most so many tokens each, padding included
                where rows are not brought together by prompt; `"auto"`: as many as one had with padding. A row that is
                longer gets a micro-batch of its own; where there are too few micro-batches, rows are dealt out as
                without it.
            ranks ([`Ranks`], *optional*):
                Deal the rows of all processes out to them first, so that each has about equal work in each optimizer
                step. All processes call this together. Rows stay where they are if these are of different kinds.
        """
        self.is_arranged, self.skips_rows_without_weight = True, skip_zero_advantage and skip_zero_weight
        functions = (carries_gradient, has_weight, lambda rows: loss_mask(rows).sum(1)) if skip_zero_advantage else ()
        self._known, of_batches = self._copied_to_host(*functions)
        windows, kept = self._windows(window), []
        for targets in windows:
            is_kept = torch.ones(sum(len(self._known[index]) for index in targets), dtype=torch.bool)
            if skip_zero_advantage:
                is_live, weighs, tokens = map(torch.cat, zip(*(of_batches[index] for index in targets), strict=True))
                is_live = is_live.bool()
                is_kept = is_live & weighs.bool() if skip_zero_weight else is_live
                left_out = tokens[~is_live]
                self._left_out[targets.start] = LeftOut(
                    len(left_out),
                    int((left_out > 0).sum()),
                    int(left_out.sum()),
                    int((is_live & ~is_kept).sum()),
                )
            kept.append(is_kept)
        how: dict[str, Any] = {"by_prompt": by_prompt, "most_tokens": most_tokens}
        if ranks is not None and self._deal_out_to_ranks(windows, kept, ranks, **how):
            return
        deals = []
        for targets, is_kept in zip(windows, kept, strict=True):
            rows = concatenate([self._micro_batches[index] for index in targets])
            known = [row for index in targets for row in self._known[index]]
            order = is_kept.nonzero().flatten().tolist()
            deals.append(_Deal(rows, known, self._shares(rows, known, order, targets, **how)))
        self._deal_out(deals)

    def _deal_out_to_ranks(
        self,
        windows: Sequence[range],
        kept: Sequence[torch.Tensor],
        ranks: Ranks,
        *,
        by_prompt: bool,
        most_tokens: int | Literal["auto"] | None,
    ) -> bool:
        """Deal rows out to all processes, and then to micro-batches; `False`, and nothing done, if they cannot be."""
        steps = [step for step, is_kept in enumerate(kept) for _ in is_kept]
        balanced = balance(
            concatenate(self._micro_batches),
            [row for of_batch in self._rows_on_host() for row in of_batch],
            steps,
            torch.cat(list(kept)).tolist(),
            ranks,
            by_prompt=by_prompt,
            padded_tokens=self.padded_tokens,
        )
        if balanced is None:
            return False
        rows, known = balanced.rows, balanced.known
        self.padded_tokens, self.exchange = balanced.padded_tokens, balanced.figures
        deals = []
        for targets, order in zip(windows, balanced.orders, strict=True):
            shares = self._shares(rows, known, order, targets, by_prompt=balanced.by_prompt, most_tokens=most_tokens)
            # Where all processes come together in each micro-batch (ZeRO-2 and 3, FSDP), the fullest of each go
            # together too.
            fullest_first = sorted(shares.values(), key=lambda share: -sum(known[row].used_columns for row in share))
            deals.append(_Deal(rows, known, dict(zip(targets, fullest_first, strict=True))))
        self._deal_out(deals)
        return True

    def leave_out_rows_without_weight(
        self, window: int, *, by_prompt: bool, most_tokens: int | Literal["auto"] | None = None
    ) -> None:
        """Leave out the rows of which no token has a weight, now that weights are known of some optimizer steps more.

        Args:
            window (`int`), by_prompt (`bool`), most_tokens (`int` or `"auto"`, *optional*):
                As in [`~RolloutBuffer.arrange`], which has left out those without a gradient.
        """
        self.skips_rows_without_weight = True
        full_batches = {}
        for targets in self._windows(window):
            full = [index for index in targets if index not in self._empty]
            if full and all("importance_sampling_ratio" in self._micro_batches[index] for index in full):
                full_batches[targets] = full
        if not full_batches:
            return
        flags = on_host([has_weight(self._micro_batches[index]) for full in full_batches.values() for index in full])
        deals = []
        for targets, full in full_batches.items():
            is_kept = torch.cat([flags.pop(0) for _ in full]).bool()
            count = int((~is_kept).sum())
            if count:
                before = self.left_out(targets.start)
                self._left_out[targets.start] = replace(before, rows_without_weight=before.rows_without_weight + count)
                known = [row for index in full for row in self._rows_on_host()[index]]
                rows = concatenate([self._micro_batches[index] for index in full])
                order = is_kept.nonzero().flatten().tolist()
                shares = self._shares(rows, known, order, targets, by_prompt=by_prompt, most_tokens=most_tokens)
                deals.append(_Deal(rows, known, shares))
        self._deal_out(deals)

    def shuffle(self, window: int, *, by_prompt: bool, most_tokens: int | Literal["auto"] | None = None) -> None:
        """Deal all rows out to the optimizer steps anew, at random (torch's generator on the CPU).

        Not while the old policy's log-probabilities are known for some rows only, which is so when passes began in the
        middle of a batch. The arguments are those of [`~RolloutBuffer.arrange`].
        """
        full = [index for index in range(len(self)) if index not in self._empty]
        keys = [self._micro_batches[index].keys() for index in full]
        if not full or any(each != keys[0] for each in keys):
            return
        rows = concatenate([self._micro_batches[index] for index in full])
        known = [row for index in full for row in self._rows_on_host()[index]]
        windows = self._windows(window)
        orders = even_shares(torch.randperm(len(known)).tolist(), len(windows))
        shares: dict[int, Sequence[int]] = {}
        for targets, order in zip(windows, orders, strict=True):
            shares.update(self._shares(rows, known, order, targets, by_prompt=by_prompt, most_tokens=most_tokens))
        self._deal_out([_Deal(rows, known, shares)])

    def _windows(self, window: int) -> list[range]:
        return [range(start, min(start + window, len(self))) for start in range(0, len(self), window)]

    def _shares(
        self,
        rows: MicroBatch,
        known: Sequence[RowOnHost],
        order: Sequence[int],
        targets: range,
        *,
        by_prompt: bool,
        most_tokens: int | Literal["auto"] | None,
    ) -> dict[int, Sequence[int]]:
        """Which of the rows `order` each of the micro-batches `targets` gets."""
        to_pack = [row.row for row in known if row.row is not None]
        number, shares, is_packed = len(targets), None, by_prompt and len(to_pack) == len(known)
        if most_tokens == "auto":
            most_tokens = self.padded_tokens
        if is_packed:
            if most_tokens is not None:
                shares = fewest_shares_by_prompt(to_pack, order, number, most_tokens)
            if shares is None:
                shares = shares_by_prompt(to_pack, order, number, self.padded_tokens)
        if shares is None:
            prompt_columns = rows["prompt_ids"].size(1)
            widths = [prompt_columns + max(1, row.used_columns) for row in known]
            if most_tokens is not None and not is_packed:
                shares = fewest_padded_shares(widths, order, number, most_tokens)
            if shares is None:
                shares = even_shares(order, number)
                # With rows of other processes there may be more than TRL's micro-batch has.
                if max(map(len, shares)) > self.padded_shape[0]:
                    shares = fewest_padded_shares(widths, order, number, self.padded_tokens) or shares
        return dict(zip(targets, shares, strict=True))

    def _deal_out(self, deals: Sequence[_Deal]) -> None:
        """Give micro-batches their rows: one copy of the rows' numbers to the device, which nobody waits for."""
        if not deals:
            return
        known = self._rows_on_host()
        orders = [
            torch.tensor([row for share in deal.shares.values() for row in share], dtype=torch.long) for deal in deals
        ]
        device = deals[0].rows["completion_ids"].device
        for deal, order in zip(deals, to_device(orders, device), strict=True):
            dealt, start = select(deal.rows, order), 0
            for index, share in deal.shares.items():
                rows = select(dealt, slice(start, start + len(share)))
                self._micro_batches[index] = rows if share else empty_row(deal.rows)
                known[index] = [deal.known[row] for row in share] or [EMPTY_ROW]
                (self._empty.discard if share else self._empty.add)(index)
                start += len(share)
        self._forward_inputs.clear()
        self._layouts = None

    # Checkpoints

    def find_unwritable(self) -> str | None:
        """What a file cannot hold of the rollouts: values that are no tensors and not of JSON's types."""
        for micro_batch in self._micro_batches:
            for key, value in micro_batch.items():
                try:
                    is_kept = isinstance(value, torch.Tensor) or json.loads(json.dumps(value)) == value
                except (TypeError, ValueError):
                    is_kept = False
                if not is_kept:
                    return f"{key}: {value!r:.60}"
        return None

    def save(self, folder: str | os.PathLike[str], rank: int, num_ranks: int, state: dict[str, Any]) -> None:
        """Write the rollouts of a rank: `rank-00000-of-00002.safetensors` and the `.json` beside it.

        Args:
            folder (`str` or `PathLike`):
                Folder to write into; made if it is not there.
            rank (`int`), num_ranks (`int`):
                The process and the number of processes.
            state (`dict`):
                What else is to be kept, of JSON's types.
        """
        tensors, others = {}, []
        for index, micro_batch in enumerate(self._micro_batches):
            others.append({key: value for key, value in micro_batch.items() if not isinstance(value, torch.Tensor)})
            for key, value in micro_batch.items():
                if isinstance(value, torch.Tensor):
                    # a copy of its own: what micro-batches share, the format does not take
                    tensors[f"{index}.{key}"] = value.detach().to("cpu", copy=True).contiguous()
        content = {
            "format": FORMAT,
            "start_step": self.start_step,
            "has_only_text": self.has_only_text,
            "is_arranged": self.is_arranged,
            "skips_rows_without_weight": self.skips_rows_without_weight,
            "left_out": {index: asdict(left_out) for index, left_out in self._left_out.items()},
            "padded_shape": self.padded_shape,
            "padded_tokens": self.padded_tokens,
            "empty": sorted(self._empty),
            "micro_batches": others,
            **state,
        }
        write_rollouts(folder, rank, num_ranks, tensors, content)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], rank: int, num_ranks: int, device: torch.device | str = "cpu"
    ) -> tuple["RolloutBuffer | None", dict[str, Any]]:
        """Read what [`~RolloutBuffer.save`] or [`save_no_rollouts`] wrote.

        Returns:
            `tuple[RolloutBuffer | None, dict]`:
                The rollouts (`None` where there were none) and the state.

        Raises:
            RolloutError: If a file is damaged, missing, or of another kind.
        """
        tensors, content = read_rollouts(folder, rank, num_ranks)
        if content.get("micro_batches") is None:
            return None, content
        micro_batches = [dict(micro_batch) for micro_batch in content["micro_batches"]]
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            micro_batches[int(index)][key] = tensor.to(device)
        buffer = cls(micro_batches, content["start_step"])
        buffer.has_only_text = content["has_only_text"]
        buffer.is_arranged = content["is_arranged"]
        buffer.skips_rows_without_weight = content.get("skips_rows_without_weight", False)
        buffer._left_out = {int(index): LeftOut(**left_out) for index, left_out in content["left_out"].items()}
        buffer.padded_shape = tuple(content["padded_shape"])
        buffer.padded_tokens = content.get("padded_tokens", math.prod(buffer.padded_shape))
        buffer._empty = set(content["empty"])
        return buffer, content


def load_matching_rollouts(
    folder: Path,
    rank: int,
    num_ranks: int,
    device: torch.device,
    *,
    global_step: int,
    settings: dict[str, Any],
) -> tuple[RolloutBuffer | None, dict[str, Any] | None, str | None]:
    """The rollouts of a checkpoint, if a run with these settings can go on with them.

    Args:
        folder (`Path`), rank (`int`), num_ranks (`int`), device (`torch.device`):
            Where they lie, the process, and where to put them.
        global_step (`int`):
            Optimizer steps of the checkpoint.
        settings (`dict`):
            All on which the rows depend, of JSON's types; to be compared with the state's entry `settings`.

    Returns:
        `tuple[RolloutBuffer | None, dict | None, str | None]`:
            The rollouts (`None` also where there were none between two generations), what else was kept, and why
            there is neither.

    Raises:
        RolloutError: If a file is damaged, missing, or of another checkpoint.
    """
    if not any(folder.glob("rank-*-of-*.*")):
        return None, None, f"There are no rollouts in {folder}"
    if not any(folder.glob(f"rank-*-of-{num_ranks:05d}.*")):
        return None, None, f"The rollouts in {folder} are of another number of processes"
    rollouts, state = RolloutBuffer.load(folder, rank, num_ranks, device)
    if state["global_step"] != global_step:
        raise RolloutError(
            f"{rollout_files(folder, rank, num_ranks)[1]} is of step {state['global_step']}, this checkpoint of step "
            f"{global_step}; delete the folder {str(folder)!r} to go on with fresh rollouts"
        )
    before = state["settings"]
    changed = [name for name in sorted(before.keys() | settings.keys()) if before.get(name) != settings.get(name)]
    if changed:
        changes = ", ".join(f"{name}: {before.get(name)!r} to {settings.get(name)!r}" for name in changed)
        return None, None, f"Settings on which the rollouts depend have changed since the checkpoint ({changes})"
    return rollouts, state, None
