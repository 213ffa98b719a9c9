"""`EvaluationCallback`: held-out problems before, during and after training, in every tracker and beside the run.

```python
trainer = GRPOExtTrainer(..., args=GRPOExtConfig(..., eval_strategy="steps", eval_steps=50), eval_dataset=problems)
evaluation = EvaluationCallback(trainer, problems)
trainer.add_callback(evaluation)
trainer.train()
evaluation.before["heldout"].estimates["strict"], evaluation.after["heldout"].estimates["strict"]
```
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import ProgressCallback, TrainerCallback

from ..interrupt import has_interrupted
from .answers import Answer, read_answers, write_answers, write_at_once, write_lines
from .driver import check_problems, evaluate
from .figures import Figures, figures_of
from .history import AFTER, BEFORE, FIGURES_FILE, FOLDER, STEP, EvaluationRecord, answers_file, read_history


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import GRPOTrainer


logger = get_logger(__name__)

ONLY_SET = "heldout"


class EvaluationCallback(TrainerCallback):
    """Evaluates the policy before, during and after training; works with any `trl.GRPOTrainer`.

    During training `args.eval_strategy` says when: each time that the trainer evaluates (its own evaluation takes the
    rewards of `eval_dataset`), this evaluates too. The means of its figures go to every tracker, as `eval/strict`,
    `eval/answer`, `eval/pass@4` and so on, and into the trainer's own metrics, so that
    `metric_for_best_model="answer"`, `load_best_model_at_end` and `EarlyStoppingCallback` work with them. `before` is
    logged at step 0 and `after` at the last step, under the same names; with `load_best_model_at_end` it is the best
    model that `after` measures. The same weights are not measured twice: `eval_on_start`, and an evaluation at the
    last step, cost nothing more.

    Completions come from the trainer's vLLM if it has one, which is brought the policy's weights, and from
    `model.generate` otherwise; prompts become tokens as in training. `rollout_func`, tools and environments take no
    part. Everything works among several processes, whatever holds the weights.

    All answers are kept, in `before.jsonl`, `step-000100.jsonl` and `after.jsonl` (of further sets
    `before.<set>.jsonl` and so on), each of them whole or not there, and all figures with their intervals in
    `figures.jsonl`. A fresh start removes those of an earlier attempt. A run that goes on from a checkpoint keeps
    those that the checkpoint's log knows; its `before` is that of the untrained policy, from `before.jsonl`, or `None`
    where that is missing.

    Args:
        trainer (`GRPOTrainer`):
            The trainer, to which the callback is then added with `trainer.add_callback`.
        problems (`Dataset` or `Mapping[str, Dataset]`):
            Problems with the columns `prompt` and `answer`, and `id` if they have names; or several sets of them.
            Figures of the first one are logged as `eval_<figure>`, those of others as `eval_<set>_<figure>`.
        max_new_tokens (`int`, *optional*):
            Longest completion, in tokens. By default that of training, `args.max_completion_length`.
        samples_per_item (`int`, *optional*, defaults to `4`):
            Samples for each problem beside the greedy completion; 0 leaves them out.
        temperature (`float`, *optional*, defaults to `1.0`):
            Their temperature.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions that are generated at once on each process; vLLM sees to that itself.
        seed (`int`, *optional*):
            Seed of the samples, the same at each evaluation. By default `args.seed`.
        output_dir (`str` or `PathLike`, *optional*):
            Folder of the answers. By default `answers` in `args.output_dir`.
        at_ends (`bool`, *optional*, defaults to `True`):
            Evaluate before and after training too.

    Attributes:
        before (`dict[str, Figures]` or `None`):
            Figures of the policy before training, by the name of the set; a single set's is `"heldout"`.
        after (`dict[str, Figures]` or `None`):
            Figures of the policy that training has ended with.
        history (`dict[int, dict[str, Figures]]`):
            Those of the evaluations in between, by step.

    Raises:
        ValueError: If problems cannot be evaluated on, a set has a name that no file can have, or a number makes no
            sense.
    """

    def __init__(
        self,
        trainer: "GRPOTrainer",
        problems: "Dataset | Mapping[str, Dataset]",
        *,
        max_new_tokens: int | None = None,
        samples_per_item: int = 4,
        temperature: float = 1.0,
        batch_size: int = 64,
        seed: int | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        at_ends: bool = True,
    ) -> None:
        self._trainer = trainer
        self.problems = dict(problems) if isinstance(problems, Mapping) else {ONLY_SET: problems}
        if not self.problems:
            raise ValueError("problems is empty: name at least one set of problems")
        for name, dataset in self.problems.items():
            if not re.fullmatch(r"\w[\w-]*", name):
                raise ValueError(f"problems: a set is called {name!r}; use letters, digits, '_' and '-'")
            try:
                check_problems(dataset)
            except ValueError as error:
                raise ValueError(f"problems, set {name!r}: {error}") from error
        self.max_new_tokens = trainer.args.max_completion_length if max_new_tokens is None else max_new_tokens
        self.samples_per_item, self.temperature, self.batch_size = samples_per_item, temperature, batch_size
        self.seed = trainer.args.seed if seed is None else seed
        self.at_ends = at_ends
        for name, least in (("max_new_tokens", 1), ("samples_per_item", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {value!r}")
        if not temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {temperature!r}; to decode only greedily, set samples_per_item=0"
            )
        self.folder = Path(trainer.args.output_dir) / FOLDER if output_dir is None else Path(output_dir)
        self._forget()

    def _forget(self) -> None:
        self.before: dict[str, Figures] | None = None
        self.after: dict[str, Figures] | None = None
        self.history: dict[int, dict[str, Figures]] = {}
        self._records: list[EvaluationRecord] = []
        self._latest: tuple[str, int] | None = None  # evaluation and step
        self._latest_figures: dict[str, Figures] = {}
        self._latest_answers: dict[str, list[Answer]] = {}
        self._asked_for: set[str] = set()  # what of the trainer's evaluations has come with the latest one

    # Events

    def on_train_begin(self, args, state, control, **kwargs):
        # From here on before all others: they may look at the figures when the trainer has evaluated, and end their
        # logs when training does. Now behind them: by now they have begun.
        callbacks = self._trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)
        self._forget()
        if state.global_step > 0:
            self._go_on(state)
            return
        if self._trainer.accelerator.is_main_process:
            self._remove_all_but(set())
        if self.at_ends:
            self._evaluate(BEFORE, state)
            self.before = self._latest_figures
            for bar in filter(None, (callback.training_bar for callback in self._progress_callbacks())):
                bar.unpause()  # the time that training takes is counted from here

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for callback in self._progress_callbacks():
            callback.on_evaluate(args, state, control)  # the bar of the trainer's own evaluation has come to its end
        metrics = {} if metrics is None else metrics
        if not self._knows_the_weights(state, metrics):
            self._evaluate(STEP, state)
        self.history[state.global_step] = self._latest_figures
        self._asked_for.add(_prefix_of(metrics))
        metrics.update(self._to_logs(self._latest_figures))

    def on_train_end(self, args, state, control, **kwargs):
        if not self.at_ends or has_interrupted(self._trainer):
            return
        has_other_weights = (
            args.load_best_model_at_end
            and state.best_model_checkpoint is not None
            and state.best_global_step != state.global_step
        )
        if self._latest is None or self._latest[1] != state.global_step or has_other_weights:
            self._evaluate(AFTER, state)
        else:
            self._keep_again_as(AFTER)
        self.after = self._latest_figures

    def _progress_callbacks(self) -> list[ProgressCallback]:
        callbacks = self._trainer.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, ProgressCallback)]

    def _knows_the_weights(self, state: Any, metrics: Mapping[str, Any]) -> bool:
        """Whether the latest evaluation was of the weights of now.

        In training the step tells. Without training anybody may have changed them: there only the sets of one call of
        `trainer.evaluate`, which come one by one, belong together.
        """
        if self._latest is None or self._latest[1] != state.global_step:
            return False
        is_of_the_same_call = bool(self._asked_for) and _prefix_of(metrics) not in self._asked_for
        return self._trainer.is_in_train or is_of_the_same_call

    # Evaluation

    def _evaluate(self, evaluation: str, state: Any) -> None:
        """Measure all sets, and log and keep what comes out. All processes call it together, and know it after."""
        trainer, step = self._trainer, state.global_step
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)  # of a processor its own
        figures = {}
        for name, dataset in self.problems.items():
            of_set = "" if len(self.problems) == 1 else f" ({name.replace('_', ' ')})"
            when = f"at step {step}" if evaluation == STEP else evaluation
            found = evaluate(
                trainer.model_wrapped,
                tokenizer,
                dataset,
                max_new_tokens=self.max_new_tokens,
                samples_per_item=self.samples_per_item,
                temperature=self.temperature,
                batch_size=self.batch_size,
                seed=self.seed,
                accelerator=trainer.accelerator,
                vllm=trainer.vllm_generation if trainer.args.use_vllm else None,
                description=None if trainer.args.disable_tqdm else f"Evaluating {when}{of_set}",
                chat_template_kwargs=trainer.args.chat_template_kwargs,
                # as TRL's trainer generates, which puts gradient checkpointing back as training has it
                unwrap_options={
                    "gather_deepspeed3_params": trainer.args.ds3_gather_for_generation,
                    "gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs,
                },
                earlier=self._latest_answers.get(name, ()),  # whose lengths are much like those to come
            )
            figures[name], self._latest_answers[name] = found.figures, found.answers
            if trainer.accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_answers(self._file(evaluation, step, name), found.answers)
        self._latest, self._latest_figures, self._asked_for = (evaluation, step), figures, set()
        self._keep_figures(evaluation)
        # transformers' own: TRL's adds the metrics that it has collected so far, and shows completions again
        transformers.Trainer.log(trainer, self._to_logs(figures))

    def _keep_again_as(self, evaluation: str) -> None:
        """Keep the latest answers and figures under another name."""
        assert self._latest is not None
        if self._trainer.accelerator.is_main_process:
            for name in self.problems:
                source, target = self._file(*self._latest, name), self._file(evaluation, self._latest[1], name)
                if source.exists():
                    write_at_once(target, [source.read_bytes()])
        self._latest = evaluation, self._latest[1]
        self._keep_figures(evaluation)

    def _to_logs(self, figures: Mapping[str, Figures]) -> dict[str, float]:
        logs: dict[str, float] = {}
        for number, (name, of_set) in enumerate(figures.items()):
            logs.update(of_set.to_logs(_log_prefix(number, name)))
        return logs

    # Files

    def _file(self, evaluation: str, step: int, name: str) -> Path:
        is_first = name == next(iter(self.problems))
        return self.folder / answers_file(evaluation, step, None if is_first else name)

    def _keep_figures(self, evaluation: str) -> None:
        assert self._latest is not None
        step = self._latest[1]
        self._records = [record for record in self._records if (record.evaluation, record.step) != (evaluation, step)]
        self._records += [
            EvaluationRecord(evaluation, step, name, figures) for name, figures in self._latest_figures.items()
        ]
        self._write_figures()

    def _write_figures(self) -> None:
        if self._trainer.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_lines(self.folder / FIGURES_FILE, (record.to_dict() for record in self._records))

    def _remove_all_but(self, kept: set[Path]) -> None:
        """Remove answers and figures of earlier attempts; nothing else that lies there."""
        for path in sorted(self.folder.glob("*.jsonl")):
            is_ours = path.name == FIGURES_FILE or re.fullmatch(
                rf"({BEFORE}|{AFTER}|{STEP}-\d{{6,}})(\.\w[\w-]*)?\.jsonl", path.name
            )
            if is_ours and path not in kept:
                path.unlink()

    def _go_on(self, state: Any) -> None:
        """Take over what the run has measured up to the checkpoint that it goes on from.

        That is what the checkpoint's log knows: what was measured behind it, or lies there of another run, is removed.
        """
        before: dict[str, Figures] | None = None
        if self._trainer.accelerator.is_main_process:
            self._records = [record for record in self._recorded() if self._is_in_log(record, state.log_history)]
            files = {self._file(record.evaluation, record.step, record.set) for record in self._records}
            self._remove_all_but(files)
            if self._records:
                self._write_figures()
            before = self._read_before()
            newest = {record.set: record for record in self._records}
            self._latest_answers = {name: self._read(of.evaluation, of.step, name) for name, of in newest.items()}
        self._records, before, self._latest_answers = broadcast_object_list(
            [self._records, before, self._latest_answers]
        )
        for record in self._records:
            if record.evaluation == STEP:
                self.history.setdefault(record.step, {})[record.set] = record.figures
        self.before = before
        if before is None and self.at_ends:
            logger.warning(
                "There are no figures of the policy before training: this run goes on from a checkpoint, and what it "
                f"measured when it began is not in {str(self.folder)!r}, or not all of it."
            )

    def _recorded(self) -> list[EvaluationRecord]:
        return [record for record in read_history(self.folder / FIGURES_FILE) if record.set in self.problems]

    def _is_in_log(self, record: EvaluationRecord, log_history: list[dict[str, Any]]) -> bool:
        number = list(self.problems).index(record.set)
        logs = record.figures.to_logs(_log_prefix(number, record.set))
        return record.evaluation != AFTER and any(
            entry.get("step") == record.step and logs.items() <= entry.items() for entry in log_history
        )

    def _read(self, evaluation: str, step: int, name: str) -> list[Answer]:
        """An evaluation's answers of a set; none where the file is missing or damaged."""
        try:
            return read_answers(self._file(evaluation, step, name))
        except (OSError, ValueError):
            return []

    def _read_before(self) -> dict[str, Figures] | None:
        """Figures of the answers before training; `None` unless there are some of each problem."""
        known = {record.set for record in self._records if record.evaluation == BEFORE}
        figures = {}
        for name, dataset in self.problems.items():
            answers = self._read(BEFORE, 0, name) if name in known else []
            ids = dataset["id"] if "id" in dataset.column_names else range(len(dataset))
            if not answers or {answer.id for answer in answers} != set(ids):
                return None
            figures[name] = figures_of([answer.graded() for answer in answers])
        return figures


def _log_prefix(number: int, name: str) -> str:
    """What the figures of a set begin with in logs; trackers show `eval_` as `eval/`."""
    return "eval_" if number == 0 else f"eval_{name}_"


def _prefix_of(metrics: Mapping[str, Any]) -> str:
    """Which of the trainer's evaluation sets its metrics are of: `eval`, or `eval_<set>`."""
    return next((name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")), "eval")
