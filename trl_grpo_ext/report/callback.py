"""`RunRecordCallback`: a run's own record, `record.jsonl` in its output folder, written while it trains.

```python
trainer = trl.GRPOTrainer(...)  # `GRPOExtTrainer` adds the callback itself
trainer.add_callback(RunRecordCallback(trainer))
trainer.train()
```
"""

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .. import compat
from ..config import extension_setting
from ..evaluation.history import FIGURES_FILE, read_history
from ..evaluation.history import FOLDER as ANSWERS
from ..rewards.references import reference_to_text
from ..rewards.text import conversation_to_text
from .about import about_fast_paths, about_rewards, about_run, reference_column
from .doctor import PROBLEM
from .generations import RewardAbout, generation_statistics
from .record import RECORD_FILE, RecordError, Run, Sample, read_record, shortened, to_line
from .watch import Watch
from .windows import thinned


if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = get_logger(__name__)
# What it says is for people, and of the whole run: without the rank that the other one puts before it.
doctors_logger = logging.getLogger(Watch.__module__)

# Completions of a group that are kept.
MOST_SAMPLES = 16
# Of which problems it is remembered that completions of them are kept, so that they are seen again later.
MOST_PROMPTS_KNOWN = 200
# In memory: steps, generations and logs are thinned out beyond so many of each, and texts of completions are those of
# so many generations.
MOST_IN_MEMORY, TEXTS_IN_MEMORY = 1200, 5
# What a reward function that extracts answers gives to TRL's `log_extra`.
EXTRACTED = "extracted_answer"
# What the trainer logs that is no step's: figures of evaluations, and of the training as a whole.
_NOT_OF_A_STEP = re.compile("eval_.*|train_.*|total_flos|epoch|step")


@dataclass
class _Batch:
    """What is seen of a generation batch on its way through the trainer; rows are this process' alone."""

    step: int
    inputs: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[Any] = ()
    completions: Sequence[Any] = ()
    completion_ids: Sequence[Sequence[int]] = ()
    extracted: Sequence[Any] = ()
    scores: list[list[float]] = field(default_factory=list)  # of all processes, a row for each completion


class RunRecordCallback(TrainerCallback):
    """Writes a run's record; works with any `trl.GRPOTrainer`, and changes nothing of what is trained.

    See [`trl_grpo_ext.report.record`] for the events. The main process writes, each event as it happens, so a run that
    is killed loses no more than its last line. A fresh start begins a new file in the place of the old one; a run that
    goes on from a checkpoint adds to it. Where the file cannot be written, training goes on without it, with a
    warning.

    Numbers are of all processes' completions, texts of the main process'. Of the first 20 generation batches one group
    of completions is kept (of a large one 16), then of every second until the 40th, of every fourth until the 80th and
    so on, at most 4,000 characters of each text. Of 10,000 generations that is 110 groups, a few MB; numbers are some
    2 kB a step. A prompt of which completions were kept before is preferred when it comes again, so that the same
    problem is seen early and late.

    Args:
        trainer (`GRPOTrainer`):
            The trainer, to which the callback is then added with `trainer.add_callback`. Of several of them the last
            one writes.
        dataset_name (`str`, *optional*):
            What the data set is called; by default what the run's settings say.

    Attributes:
        run ([`Run`]):
            The record so far, of a long run thinned out; on the main process.
    """

    def __init__(self, trainer: "GRPOTrainer", *, dataset_name: str | None = None) -> None:
        self._trainer, self._dataset_name = trainer, dataset_name
        self.run = Run()
        self._observed: compat.ObservedGenerations | None = None
        self._forget()

    def _forget(self) -> None:
        if self._observed is not None:  # of a training that raised
            self._observed.end()
        self._observed = None
        self._is_active = False
        self._writes = True
        self._batch: _Batch | None = None
        self._num_generations = 0
        self._prompts_known: dict[str, None] = {}
        self._rewards: list[RewardAbout] = []
        self._watch: Watch | None = None
        self._metrics_seen: dict[str, tuple[list[float], int]] = {}
        self._metrics_of_steps: set[str] = set()
        self._utilization: list[float] | None = []  # None where it cannot be had
        self._seconds = {"generation": 0.0, "rewards": 0.0}
        self._step_began = self._step_ended = perf_counter()
        self._learning_rate: float | None = None
        self._has_told_fast_paths = False
        self.seconds = 0.0  # that this callback has taken

    # Events of the trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._forget()
        callbacks = self._trainer.callback_handler.callbacks
        is_last = [callback for callback in callbacks if isinstance(callback, RunRecordCallback)][-1:] == [self]
        self._is_active = is_last and self._trainer.accelerator.is_main_process
        self.run = Run(folder=Path(args.output_dir))

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Not in `on_train_begin`: there another callback may yet refuse a run that would destroy another one's record.
        if self._is_active and self._observed is None:
            self._guarded(self._begin, state)
            self._observed = compat.ObservedGenerations(
                self._trainer, batch=self._see_batch, completions=self._see_completions, rewards=self._see_rewards
            )
            self._step_ended = perf_counter()

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if self._is_active:
            self._step_began = perf_counter()
            self._seconds = {"generation": 0.0, "rewards": 0.0}
            self._learning_rate = _learning_rate(optimizer)

    def on_substep_end(self, args, state, control, **kwargs):
        if self._is_active:
            self._guarded(self._measure_utilization)

    def on_step_end(self, args, state, control, **kwargs):
        if self._is_active:
            self._guarded(self._end_step, state)
            self._guarded(self._diagnose)
            self._step_ended = perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._is_active and self._observed is not None and logs:
            self._guarded(self._add_log, state, logs)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._is_active:
            file = Path(args.output_dir) / ANSWERS / FIGURES_FILE
            self._guarded(lambda: setattr(self.run, "evaluations", read_history(file)))

    def on_train_end(self, args, state, control, **kwargs):
        if not self._is_active:
            return
        if self._observed is None:  # nothing was left to train
            self._guarded(self._begin, state)
        else:
            self._observed.end()
            self._observed = None
        self._guarded(self._diagnose, is_last=True)
        status = "finished" if state.global_step >= state.max_steps else "stopped"
        self._guarded(self._add, {"event": "end", "step": state.global_step, "time": time.time(), "status": status})

    def _guarded(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call a function; what it raises ends the record, and not the run."""
        if not self._is_active:
            return
        began = perf_counter()
        try:
            function(*args, **kwargs)
        except Exception as error:
            self._is_active = False
            logger.warning(f"This run is not recorded any more ({type(error).__name__}: {error}); it goes on.")
        self.seconds += perf_counter() - began

    # What is seen of a generation batch; the functions that stand before the trainer's

    def _see_batch(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._trainer.model.training:
            return method(*args, **kwargs)
        self._batch = _Batch(self._trainer.state.global_step)
        rows = method(*args, **kwargs)
        batch, self._batch = self._batch, None
        self._guarded(self._add_generation, batch, rows)
        return rows

    def _see_completions(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._batch is None:
            return method(*args, **kwargs)
        began = perf_counter()
        generated = method(*args, **kwargs)
        self._seconds["generation"] += perf_counter() - began
        return generated

    def _see_rewards(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._batch is None:
            return method(*args, **kwargs)
        began = perf_counter()
        scores = method(*args, **kwargs)
        self._seconds["rewards"] += perf_counter() - began
        self._guarded(self._keep_rows, self._batch, scores, *args, **kwargs)
        return scores

    def _keep_rows(
        self, batch: _Batch, scores: Any, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> None:
        batch.inputs, batch.prompts, batch.completions = inputs, prompts, completions
        batch.completion_ids = completion_ids_list
        batch.scores = scores.tolist()
        columns = compat.columns_logged_by_rewards(self._trainer)
        of_answers = [values for name, values in columns.items() if name.split("/")[-1] == EXTRACTED]
        batch.extracted = list(of_answers[0]) if of_answers else []

    # Events of the record

    def _begin(self, state: Any) -> None:
        if state.global_step > 0:
            with suppress(RecordError):
                self.run = read_record(self._file)
        self._write(lambda: self._begin_file(goes_on=state.global_step > 0))
        self._rewards = about_rewards(self._trainer)
        about = about_run(self._trainer, self._dataset_name)
        self._add({"event": "begin", "step": state.global_step, "time": time.time(), "about": about})
        self._num_generations = len(self.run.generations)
        for generation in self.run.generations:
            for sample in generation.samples[:1]:
                self._know_prompt(_hash(sample.prompt))
        self._thin_out()
        self._watch = Watch() if extension_setting(self._trainer.args, "diagnose") else None

    def _add_generation(self, batch: _Batch, rows: Any) -> None:
        if not batch.scores:  # a trainer that makes its batches in another way
            return
        size = self._trainer.num_generations
        normalizes_first = self._trainer.multi_objective_aggregation == "normalize_then_sum"
        scores = {reward.name: [row[i] for row in batch.scores] for i, reward in enumerate(self._rewards)}
        statistics = generation_statistics(scores, self._rewards, size, normalizes_first=normalizes_first)
        event: dict[str, Any] = {
            "event": "generation",
            "step": batch.step,
            "statistics": _rounded(statistics.to_dict()),
        }
        self._num_generations += 1
        if is_sampled(self._num_generations):
            event["samples"] = [sample.to_dict() for sample in self._samples(batch, rows, size)]
        self._add(event)

    def _samples(self, batch: _Batch, rows: Any, size: int) -> list[Sample]:
        """Completions of one group: of a prompt that is known, or else of the one with the smallest hash."""
        prompts = {begin: conversation_to_text(batch.prompts[begin]) for begin in range(0, len(batch.prompts), size)}
        if not prompts:
            return []
        hashes = {begin: _hash(shortened(prompt)) for begin, prompt in prompts.items()}
        begin = min(hashes, key=lambda begin: (hashes[begin] not in self._prompts_known, hashes[begin]))
        self._know_prompt(hashes[begin])
        end = min(begin + min(size, MOST_SAMPLES), len(batch.prompts))
        advantages: list[float | None] = [None] * (end - begin)
        if len(rows["advantages"]) == len(batch.prompts):  # a subclass may have left rows out, or put some in
            chosen = rows["advantages"][begin:end].float()
            # of some trainers there is one for each token
            advantages = (chosen.mean(dim=1) if chosen.dim() > 1 else chosen).tolist()
        return [
            self._sample(batch, row, prompts[begin], advantage)
            for row, advantage in zip(range(begin, end), advantages, strict=True)
        ]

    def _sample(self, batch: _Batch, row: int, prompt: str, advantage: float | None) -> Sample:
        completion, ids = conversation_to_text(batch.completions[row]), batch.completion_ids[row]
        extracted = batch.extracted[row] if row < len(batch.extracted) else None
        return Sample(
            step=batch.step,
            prompt=shortened(prompt),
            completion=shortened(completion),
            reference=self._reference(batch.inputs[row]),
            extracted=None if extracted is None else shortened(str(extracted)),
            rewards={reward.name: _rounded(batch.scores[row][i]) for i, reward in enumerate(self._rewards)},
            advantage=_rounded(advantage),
            tokens=len(ids),
            is_truncated=self._is_truncated(ids),
            chars=len(completion),
        )

    def _reference(self, columns: Mapping[str, Any]) -> str | None:
        reference = reference_to_text(columns.get(reference_column(self._trainer.reward_funcs)))
        return None if reference is None else shortened(reference)

    def _is_truncated(self, ids: Sequence[int]) -> bool:
        """Whether a completion ends in nothing that ends one, as TRL says it, and is as long as it may be."""
        tokenizer = self._trainer.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        # before TRL 1.14 there was one
        end_ids = getattr(self._trainer, "eos_token_ids", [tokenizer.eos_token_id])
        ends = bool(ids) and (ids[-1] in end_ids or ids[-1] == tokenizer.pad_token_id)
        return not ends and len(ids) >= self._trainer.max_completion_length

    def _know_prompt(self, hashed: str) -> None:
        if len(self._prompts_known) < MOST_PROMPTS_KNOWN:
            self._prompts_known[hashed] = None

    def _end_step(self, state: Any) -> None:
        self._measure_utilization()
        if self._utilization:
            compat.append_metric(self._trainer, "gpu/utilization", sum(self._utilization) / len(self._utilization))
            self._utilization = []
        now = perf_counter()
        known = sum(self._seconds.values())
        seconds = {
            **self._seconds,
            "update": max(now - self._step_began - known, 0.0),
            "between": self._step_began - self._step_ended,
        }
        metrics = self._new_metrics()
        if self._learning_rate is not None:
            metrics["learning_rate"] = self._learning_rate
        self._metrics_of_steps |= metrics.keys()
        self._add(
            {
                "event": "step",
                "step": state.global_step,
                "time": time.time(),
                "metrics": _rounded(metrics),
                "seconds": _rounded(seconds),
            }
        )
        self._tell_fast_paths(state)
        self._thin_out()

    def _diagnose(self, is_last: bool = False) -> None:
        """Say what the doctor finds: each problem once, and once that it no longer holds; all else to the record."""
        if self._watch is None:
            return
        try:
            events = self._watch.look(self.run, is_last=is_last)
        except Exception as error:  # a diagnosis that fails is no reason to stop, nor to lose the record
            self._watch = None
            logger.warning(f"doctor: no more diagnosis of this run ({type(error).__name__}: {error}); it goes on.")
            return
        for event in events:
            self._add(event)
            if event["is_first"]:
                level = logging.WARNING if event["holds"] and event["severity"] == PROBLEM else logging.INFO
                doctors_logger.log(level, f"doctor: {event['message']}")

    def _tell_fast_paths(self, state: Any) -> None:
        """Behind the first step: by then the trainer has found out what it can do."""
        if self._has_told_fast_paths:
            return
        self._has_told_fast_paths = True
        paths = about_fast_paths(self._trainer)
        if paths != self.run.about.get("fast_paths"):
            self._add({"event": "about", "step": state.global_step, "about": {"fast_paths": paths}})

    def _new_metrics(self) -> dict[str, float]:
        """Means of what TRL has collected since the step before; it begins new lists when it has logged."""
        means = {}
        for name, values in compat.metrics_of_training(self._trainer).items():
            seen, number = self._metrics_seen.get(name, (None, 0))
            new = values[number:] if values is seen else values
            self._metrics_seen[name] = values, len(values)
            known = [value for value in new if not math.isnan(value)]
            if known:
                means[name] = sum(known) / len(known)
        return means

    def _add_log(self, state: Any, logs: Mapping[str, Any]) -> None:
        numbers = {
            name: value
            for name, value in logs.items()
            if isinstance(value, int | float)
            and name not in self._metrics_of_steps
            and not _NOT_OF_A_STEP.fullmatch(name)
        }
        if numbers:
            self._add({"event": "log", "step": state.global_step, "logs": _rounded(numbers)})

    def _measure_utilization(self) -> None:
        if self._utilization is None or self._trainer.accelerator.device.type != "cuda":
            return
        try:
            self._utilization.append(torch.cuda.utilization(self._trainer.accelerator.device) / 100)
        except Exception:  # no driver's library, or no permission: whatever it raises, it cannot be had
            self._utilization = None

    # The file, and what is in memory

    @property
    def _file(self) -> Path:
        return Path(self._trainer.args.output_dir) / RECORD_FILE

    def _add(self, event: Mapping[str, Any]) -> None:
        line = to_line(event)
        self.run.add(json.loads(line))
        self._write(lambda: self._append(line.encode()))

    def _write(self, function: Callable[[], None]) -> None:
        """Do something with the file. Where that fails it is the last thing: a part of a record would mislead."""
        if not self._writes:
            return
        try:
            function()
        except OSError as error:
            self._writes = False
            file = str(self._file)
            logger.warning(
                f"The run's record {file!r} cannot be written ({error.strerror or error}); the run goes on."
            )

    def _begin_file(self, goes_on: bool) -> None:
        file = self._file
        file.parent.mkdir(parents=True, exist_ok=True)
        if not goes_on:
            file.write_bytes(b"")
            return
        with file.open("ab+") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read() != b"\n":  # half a line, of a run that was killed
                    stream.write(b"\n")

    def _append(self, content: bytes) -> None:
        with self._file.open("ab") as stream:
            stream.write(content)

    def _thin_out(self) -> None:
        run = self.run
        run.steps = thinned(run.steps, MOST_IN_MEMORY)
        run.generations = thinned(run.generations, MOST_IN_MEMORY)
        run.logs = thinned(run.logs, MOST_IN_MEMORY)
        with_texts = [i for i, generation in enumerate(run.generations) if generation.samples]
        for i in with_texts[:-TEXTS_IN_MEMORY]:
            run.generations[i] = replace(run.generations[i], samples=())


def is_sampled(number: int) -> bool:
    """Whether completions of the generation batch with this number, from 1, are kept: ten of each doubling."""
    every = 1 << (math.ceil(number / 20) - 1).bit_length()
    return number % every == 0


def _rounded(value: Any) -> Any:
    """Numbers with six digits: what is kept is looked at, and not computed with."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def _learning_rate(optimizer: Any) -> float | None:
    """With which the step that begins is taken."""
    try:
        return float(optimizer.param_groups[0]["lr"])
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
