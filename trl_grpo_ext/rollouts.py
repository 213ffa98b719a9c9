"""`RolloutBuffer`: the rows of one generation batch, while the update passes over them."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .metrics import LeftOut


FORMAT = 2
FOLDER = "rollouts"

MicroBatch = dict[str, Any]


class RolloutError(ValueError):
    """Rollouts in a checkpoint that cannot be used; the message names the file and the remedy."""


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
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], start_step: int = 0) -> None:
        self._micro_batches = [dict(micro_batch) for micro_batch in micro_batches]
        self.start_step = start_step
        self.is_arranged = self.skips_rows_without_weight = False
        self.has_only_text = all(
            isinstance(value, torch.Tensor) and (value.ndim == 0 or value.size(0) == _num_rows(micro_batch))
            for micro_batch in self._micro_batches
            for value in micro_batch.values()
        ) and not any("pixel" in key or "token_type" in key for key in self._micro_batches[0])
        first = self._micro_batches[0]
        self.padded_shape = (_num_rows(first), first["prompt_ids"].size(1) + first["completion_ids"].size(1))
        self._empty: set[int] = set()  # micro-batches that hold a placeholder
        self._left_out: dict[int, LeftOut] = {}  # by the first micro-batch of the optimizer step they belong to
        self._used_widths: dict[int, int] = {}  # found once, because it costs a device synchronization

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
        width = micro_batch["completion_ids"].size(1)
        if index not in self._used_widths:
            used = micro_batch["completion_mask"].any(dim=0).nonzero()
            self._used_widths[index] = int(used[-1]) + 1 if len(used) else 1
        return {
            key: value[:, : self._used_widths[index]]
            if isinstance(value, torch.Tensor)
            and value.ndim == 2
            and value.size(1) == width
            and not key.startswith("prompt_")
            else value
            for key, value in micro_batch.items()
        }

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
        self, window: int, *, skip_zero_advantage: bool, by_prompt: bool, skip_zero_weight: bool = False
    ) -> None:
        """Deal the rows of each optimizer step out to its micro-batches anew.

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
        """
        self.is_arranged, self.skips_rows_without_weight = True, skip_zero_advantage and skip_zero_weight
        for start in range(0, len(self), window):
            targets = range(start, min(start + window, len(self)))
            rows = _concatenate([self._micro_batches[index] for index in targets])
            is_kept = torch.ones(_num_rows(rows), dtype=torch.bool)
            if skip_zero_advantage:
                is_live = carries_gradient(rows).cpu()
                tokens = loss_mask(rows).sum(1).cpu()[~is_live]
                is_kept = is_live & has_weight(rows).cpu() if skip_zero_weight else is_live
                self._left_out[start] = LeftOut(
                    len(tokens), int((tokens > 0).sum()), int(tokens.sum()), int((is_live & ~is_kept).sum())
                )
            self._deal(rows, is_kept.nonzero().flatten(), targets, by_prompt)

    def leave_out_rows_without_weight(self, window: int, *, by_prompt: bool) -> None:
        """Leave out the rows of which no token has a weight, now that weights are known of some optimizer steps more.

        Args:
            window (`int`), by_prompt (`bool`):
                As in [`~RolloutBuffer.arrange`], which has left out those without a gradient.
        """
        self.skips_rows_without_weight = True
        for start in range(0, len(self), window):
            targets = range(start, min(start + window, len(self)))
            full = [self._micro_batches[index] for index in targets if index not in self._empty]
            if not full or not all("importance_sampling_ratio" in micro_batch for micro_batch in full):
                continue
            rows = _concatenate(full)
            is_kept = has_weight(rows).cpu()
            count = int((~is_kept).sum())
            if count:
                before = self.left_out(start)
                self._left_out[start] = replace(before, rows_without_weight=before.rows_without_weight + count)
                self._deal(rows, is_kept.nonzero().flatten(), targets, by_prompt)

    def shuffle(self, window: int, *, by_prompt: bool) -> None:
        """Deal all rows out to the optimizer steps anew, at random (torch's generator on the CPU).

        Not while the old policy's log-probabilities are known for some rows only, which is so when passes began in the
        middle of a batch. The arguments are those of [`~RolloutBuffer.arrange`].
        """
        full = [micro_batch for index, micro_batch in enumerate(self._micro_batches) if index not in self._empty]
        if full and all(micro_batch.keys() == full[0].keys() for micro_batch in full):
            rows = _concatenate(full)
            starts = range(0, len(self), window)
            for start, order in zip(
                starts, torch.tensor_split(torch.randperm(_num_rows(rows)), len(starts)), strict=True
            ):
                self._deal(rows, order, range(start, min(start + window, len(self))), by_prompt)

    def _deal(self, rows: MicroBatch, order: torch.Tensor, targets: range, by_prompt: bool) -> None:
        """Give the micro-batches `targets` the rows `order`."""
        shares = torch.tensor_split(order, len(targets))
        if by_prompt:
            shares = _shares_by_prompt(rows, order.tolist(), len(targets), math.prod(self.padded_shape)) or shares
        for index, indices in zip(targets, shares, strict=True):
            self._micro_batches[index] = _select(rows, indices) if len(indices) else _empty_row(rows)
            self._used_widths.pop(index, None)
            (self._empty.discard if len(indices) else self._empty.add)(index)

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
        buffer._empty = set(content["empty"])
        return buffer, content


def loss_mask(rows: MicroBatch) -> torch.Tensor:
    """1 for the tokens that count, `(B, C)`: of the completion, and not a tool's."""
    if rows.get("tool_mask") is None:
        return rows["completion_mask"]
    return rows["completion_mask"] * rows["tool_mask"]


def column_advantages(rows: MicroBatch) -> torch.Tensor:
    """Advantages that broadcast over tokens: `(B, 1)`, or `(B, C)` where each token has one of its own."""
    advantages = rows["advantages"]
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


def carries_gradient(rows: MicroBatch) -> torch.Tensor:
    """Which rows add anything to the gradient without a KL term: advantage not 0, and a token that counts. `(B,)`.

    Unless they weigh nothing, see [`has_weight`].
    """
    return ((column_advantages(rows) != 0) & loss_mask(rows).bool()).any(dim=1)


def has_weight(rows: MicroBatch) -> torch.Tensor:
    """Which rows have a token that counts and does not weigh 0; all where nothing is known of weights. `(B,)`."""
    counts, weights = loss_mask(rows).bool(), rows.get("importance_sampling_ratio")
    return torch.ones_like(counts[:, 0]) if weights is None else ((weights != 0) & counts).any(dim=1)


def logps_of_completions(
    forwards: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: MicroBatch
) -> torch.Tensor | None:
    """The log-probabilities of a micro-batch's completions, `(B, C)`, from the first of some forwards that has them.

    Args:
        forwards (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
            Token ids, `(B, T)`, and the log-probabilities of the last of them, `(B, C)` or without the last columns in
            which all rows are padded.
        rows (`dict`):
            The micro-batch.
    """
    completion_ids, mask = rows["completion_ids"], rows["completion_mask"]
    for input_ids, logps in forwards:
        width = logps.size(1)
        if (
            len(logps) == len(completion_ids)
            and width <= completion_ids.size(1)
            and torch.equal(input_ids[:, -width:], completion_ids[:, :width])
            and not mask[:, width:].any()
        ):
            return torch.nn.functional.pad(logps, (0, completion_ids.size(1) - width))
    return None


# A group is dealt out in two parts, and its prompt computed twice, where that costs at most this share of its tokens.
_COST_OF_A_SPLIT = 0.1


@dataclass(frozen=True)
class _Part:
    """Rows of one prompt, and the tokens of a forward that computes the prompt once."""

    rows: list[int]
    prompt_tokens: int
    completion_tokens: list[int]

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(self.completion_tokens)

    def halves(self) -> list["_Part"]:
        middle = len(self.rows) // 2
        return [
            _Part(self.rows[half], self.prompt_tokens, self.completion_tokens[half])
            for half in (slice(None, middle), slice(middle, None))
        ]


def _shares_by_prompt(
    rows: MicroBatch, order: list[int], num_shares: int, most_tokens: int
) -> tuple[torch.Tensor, ...] | None:
    """Rows dealt out so that those of a prompt stay together and shares have about equally many tokens.

    Whole groups go to the lightest share, the heaviest first. They are halved while that is cheap and there are fewer
    than shares, and as long as a share has more than `most_tokens`.

    Returns:
        `tuple[torch.Tensor, ...]` or `None`:
            Indices of rows for each share; `None` if they cannot be kept below `most_tokens`.
    """
    prompt_lengths = rows["prompt_mask"].sum(1).tolist()
    completion_lengths = rows["completion_mask"].sum(1).tolist()
    prompts = rows["prompt_ids"].masked_fill(rows["prompt_mask"] == 0, -1).cpu()
    parts: dict[tuple[int, ...], _Part] = {}
    for row in order:
        prompt = tuple(prompts[row].tolist())
        part = parts.setdefault(prompt, _Part([], prompt_lengths[row], []))
        part.rows.append(row)
        part.completion_tokens.append(completion_lengths[row])
    pieces = list(parts.values())

    def halve_heaviest(where: Callable[[_Part], bool]) -> bool:
        """Halve the heaviest part that has two rows and meets a condition; whether there was one."""
        divisible = [part for part in pieces if len(part.rows) > 1 and where(part)]
        if not divisible:
            return False
        heaviest = max(divisible, key=lambda part: part.tokens)
        pieces.remove(heaviest)
        pieces.extend(heaviest.halves())
        return True

    def is_cheap(part: _Part) -> bool:
        return part.prompt_tokens <= _COST_OF_A_SPLIT * part.tokens

    while len(pieces) < num_shares and halve_heaviest(is_cheap):
        pass
    while True:
        shares: list[list[int]] = [[] for _ in range(num_shares)]
        loads = [0] * num_shares
        for part in sorted(pieces, key=lambda part: -part.tokens):
            lightest = loads.index(min(loads))
            shares[lightest] += part.rows
            loads[lightest] += part.tokens
        if max(loads) <= most_tokens:
            return tuple(torch.tensor(share, dtype=torch.long) for share in shares)
        if not halve_heaviest(lambda part: True):
            return None


def _num_rows(rows: MicroBatch) -> int:
    return int(rows["completion_ids"].size(0))


def _concatenate(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    def joined(key: str, first: Any) -> Any:
        if isinstance(first, torch.Tensor) and first.ndim > 0:
            return torch.cat([micro_batch[key] for micro_batch in micro_batches])
        return first

    return {key: joined(key, value) for key, value in micro_batches[0].items()}


def _select(rows: MicroBatch, indices: torch.Tensor) -> MicroBatch:
    return {
        key: value[indices.to(value.device)] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
        for key, value in rows.items()
    }


def _empty_row(rows: MicroBatch) -> MicroBatch:
    empty: MicroBatch = {}
    for key, value in rows.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            empty[key] = value
        elif key.startswith("prompt_"):
            empty[key] = value[:1, -1:]
        else:
            empty[key] = value[:1, :1] if value.ndim > 1 else value[:1]
    empty["completion_mask"] = torch.zeros_like(empty["completion_mask"])
    return empty


# Files


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


def rollout_files(folder: str | os.PathLike[str], rank: int, num_ranks: int) -> tuple[Path, Path]:
    """The tensors' file and the state's file of a rank."""
    stem = Path(folder) / f"rank-{rank:05d}-of-{num_ranks:05d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def save_no_rollouts(folder: str | os.PathLike[str], rank: int, num_ranks: int, state: dict[str, Any]) -> None:
    """Write that there are no rollouts to go on with: the next step generates."""
    write_rollouts(folder, rank, num_ranks, {}, {"format": FORMAT, "micro_batches": None, **state})


def write_rollouts(
    folder: str | os.PathLike[str],
    rank: int,
    num_ranks: int,
    tensors: dict[str, torch.Tensor],
    content: dict[str, Any],
) -> None:
    tensors_file, state_file = rollout_files(folder, rank, num_ranks)
    tensors_file.parent.mkdir(parents=True, exist_ok=True)
    # The state goes last and knows the tensors' checksum: without it, or with another, the pair is not whole.
    save_file(tensors, tensors_file)
    content = {**content, "sha256": _checksum(tensors_file)}
    aside = state_file.with_suffix(".json.part")
    aside.write_text(json.dumps(content))
    os.replace(aside, state_file)


def read_rollouts(
    folder: str | os.PathLike[str], rank: int, num_ranks: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors_file, state_file = rollout_files(folder, rank, num_ranks)
    remedy = f"delete the folder {str(folder)!r} to go on from this checkpoint with fresh rollouts"
    for file in (state_file, tensors_file):
        if not file.is_file():
            raise RolloutError(f"{file} is missing; restore it, or {remedy}")
    try:
        content = json.loads(state_file.read_text())
        found = content["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise RolloutError(f"{state_file} is no state of rollouts; restore it, or {remedy}") from error
    if found != FORMAT:
        raise RolloutError(f"{state_file} has format {found!r}, this version reads {FORMAT}; {remedy}")
    if content.get("sha256") != _checksum(tensors_file):
        raise RolloutError(f"{tensors_file} is damaged or not the one that was saved; restore it, or {remedy}")
    try:
        return load_file(tensors_file), content
    except (SafetensorError, OSError) as error:
        raise RolloutError(f"{tensors_file} cannot be read ({error}); restore it, or {remedy}") from error


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
