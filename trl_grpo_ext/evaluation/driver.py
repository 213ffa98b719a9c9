"""Letting a policy answer a data set's problems, and keeping every answer: greedily, and when it samples.

Greedy accuracy alone overstates what was learned, because it jumps when the most frequent way of solving a problem
changes; samples show how much of the distribution moved.

Answers are generated a chunk at a time: as many as all processes generate at once. After each chunk the main process
appends them to a file, so that whatever ends an evaluation costs a chunk, and calling it again goes on from there.
A chunk takes as long as its longest answer, on every process. So answers that are likely to be of one length share a
chunk: how long they are is known, more or less, from the problem's other answers, see [`KnownLengths`].
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

from .. import compat
from ..private import shorten_home
from ..rewards.references import reference_to_text
from ..shared_prefix.probe import undisturbed
from .answers import Answer, append_answers, read_answers, write_answers, write_at_once
from .figures import Figures, figures_of
from .generate import (
    Completion,
    Request,
    end_ids_of,
    generate,
    generate_with_trainers_vllm,
    generate_with_vllm,
    stream_of,
    to_ids,
)


if TYPE_CHECKING:
    from datasets import Dataset
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import LLM


# vLLM makes its batches itself: so many answers on each process are asked for at once, and lost if it is interrupted.
ANSWERS_OF_VLLM_AT_ONCE = 1024
SETTINGS_ENDING = ".settings.yaml"
# What greedy answers do not depend on
OF_SAMPLES = ("temperature", "seed")


@dataclass
class Evaluation:
    """What an evaluation has found, the same on every process.

    Args:
        answers (`list[Answer]`):
            All answers, in the order of the problems, each problem's greedy one first.
        figures (`Figures`):
            What they amount to.
        generated (`int`):
            How many of the answers were not on disk yet.
    """

    answers: list[Answer]
    figures: Figures
    generated: int


@dataclass(frozen=True)
class Problem:
    """A row of the data set."""

    id: str | int
    prompt: Any
    answer: Any
    prompt_ids: list[int]


@dataclass(frozen=True)
class Task:
    """An answer that is asked for: which problem's, at which temperature, the how manieth."""

    problem: Problem
    temperature: float
    sample: int

    @property
    def key(self) -> tuple[str | int, float, int]:
        return self.problem.id, self.temperature, self.sample


def key_of(answer: Answer) -> tuple[str | int, float | None, int]:
    """What answers of a file are told apart by."""
    return answer.id, answer.temperature, answer.sample


class KnownLengths:
    """How many tokens answers are likely to have, by those that are there.

    The same sample of another policy in the same training says most: the random numbers are the same. Else a problem's
    answers on average, of which the greedy one comes before all samples.

    Args:
        answers (`Iterable[Answer]`):
            Answers to the same problems; those without their number of tokens say nothing.
    """

    def __init__(self, answers: Iterable[Answer]) -> None:
        self._of_key: dict[Any, int] = {}
        self._of_problem: dict[str | int, list[int]] = defaultdict(list)
        self.add(answers)

    def add(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            if answer.tokens is not None:
                self._of_key.setdefault(key_of(answer), answer.tokens)
                self._of_problem[answer.id].append(answer.tokens)

    def of(self, task: Task) -> float:
        """An answer's likely length in tokens; infinite where nothing is known of its problem."""
        if task.key in self._of_key:
            return self._of_key[task.key]
        lengths = self._of_problem.get(task.problem.id)
        return fmean(lengths) if lengths else float("inf")


def in_chunks(tasks: Sequence[Task], lengths: KnownLengths, size: int) -> Iterator[list[Task]]:
    """The answers that are generated at once, likely long ones first; all of them at one temperature.

    What is known of `lengths` when a temperature's first chunk is asked for decides on the order of all its answers.
    """
    for temperature in dict.fromkeys(task.temperature for task in tasks):
        of_one = [task for task in tasks if task.temperature == temperature]
        of_one.sort(key=lengths.of, reverse=True)  # stays in its order where lengths are the same
        for start in range(0, len(of_one), size):
            yield of_one[start : start + size]


def check_problems(dataset: "Dataset") -> None:
    """Raise `ValueError` unless a data set has problems, each with a prompt and an answer to compare with.

    Where there is a column `id`, it must hold texts or whole numbers, none of them twice.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "column_names"):
        raise ValueError(f"problems must be a datasets.Dataset, whose length is known, not a {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("there are no problems to evaluate on; ask for at least one")
    for column in ("prompt", "answer"):
        if column not in dataset.column_names:
            raise ValueError(
                f"problems need the columns 'prompt' and 'answer', and these have {', '.join(dataset.column_names)}: "
                f"rename the one that holds the {column}"
            )
    dataset = dataset.with_format(None)
    for index, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(f"problem {index} has no prompt: {str(prompt)[:60]!r} is neither a text nor messages")
    for index, answer in enumerate(dataset["answer"]):
        if reference_to_text(answer) is None:
            raise ValueError(
                f"problem {index} has no answer to compare with: 'answer' is {str(answer)[:60]!r}, and must be a text "
                "or a number; leave the problem out"
            )
    first: dict[str | int, int] = {}
    for index, name in enumerate(dataset["id"] if "id" in dataset.column_names else ()):
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ValueError(f"problem {index} has no id: {str(name)[:60]!r} is neither a text nor a whole number")
        if first.setdefault(name, index) != index:
            raise ValueError(
                f"problems {first[name]} and {index} have the same id, {str(name)[:60]!r}: answers are told apart by "
                "it; give each problem its own, or remove the column 'id'"
            )


def evaluate(
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: "Dataset",
    *,
    max_new_tokens: int,
    samples_per_item: int = 4,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    vllm: "VLLMGeneration | LLM | None" = None,
    description: str | None = "Evaluating",
    answers_file: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    end_ids: Sequence[int] | None = None,
    unwrap_options: Mapping[str, Any] | None = None,
    earlier: Iterable[Answer] = (),
) -> Evaluation:
    """Let a policy answer problems, greedily and with samples, and grade the answers.

    Answers depend neither on the batch size nor on the number of processes or an interruption, but for rounding: where
    two tokens are all but equally likely, the shape of a batch can decide. A trainer's vLLM samples from generators of
    its own.

    Args:
        model (`nn.Module` or `None`):
            The policy, as the trainer holds it: wrapped, and shared out over processes, if `accelerator` is given.
            Its mode and the state of the random number generators are as before afterwards. `None` where a vLLM of
            one's own generates.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template if prompts are conversational.
        dataset (`datasets.Dataset`):
            The problems: texts or messages in `prompt`, in `answer` what [`reference_to_text`] understands, and a
            name for each in `id`, if there is such a column; else it is the row's number.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        samples_per_item (`int`, *optional*, defaults to `4`):
            Samples for each problem, beside the greedy answer.
        temperature (`float`, *optional*, defaults to `1.0`):
            The samples' temperature.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions that are generated at once, on each process. vLLM makes its batches itself.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        accelerator (`Accelerator`, *optional*):
            Where there are several processes: each takes its share of the problems, and all return the same.
            Weights that are shared out are gathered for that time.
        vllm (`VLLMGeneration` or `vllm.LLM`, *optional*):
            Generates in place of the policy. The `vllm_generation` of a trainer with `use_vllm=True` is brought the
            policy's weights first; TRL merges a LoRA adapter for that and takes it out again, which leaves rounding
            in the weights, as it does whenever training generates. A `vllm.LLM` has its own.
        description (`str` or `None`, *optional*, defaults to `"Evaluating"`):
            Label of the progress bar; `None` shows none.
        answers_file (`str` or `PathLike`, *optional*):
            Where the answers are kept, one JSON object a line. They are appended as they are generated, and what is
            there is not generated again; in the end the file is in the order of the problems. What the answers depend
            on is kept beside it, in a file whose name ends in `.settings.yaml`. Only the main process reads and
            writes them.
        settings (`Mapping[str, Any]`, *optional*):
            What else the answers depend on (the model's name, say), for that file: answers that were generated under
            other settings are refused.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the chat template.
        end_ids (`Sequence[int]`, *optional*):
            Tokens that end a completion. By default the tokenizer's, and those that the model's generation settings
            name.
        unwrap_options (`Mapping[str, Any]`, *optional*):
            Further arguments of TRL's `unwrap_model_for_generation`, where training uses them: it turns gradient
            checkpointing off and, with `gradient_checkpointing_kwargs`, on again.
        earlier (`Iterable[Answer]`, *optional*):
            Answers of another policy to these problems, the same on every process: an evaluation before this one.
            They say only which answers are likely to be of one length, and are generated together for that.

    Returns:
        `Evaluation`:
            The answers, and the figures with their intervals.

    Raises:
        ValueError: If there is no problem to evaluate on, a column is missing, a problem has no answer, or the answers
            that are on disk are of other problems or were generated under other settings. Nothing is generated before
            that is known.
    """
    check_problems(dataset)
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("samples_per_item", samples_per_item, 0),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if samples_per_item > 0 and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: all samples would be the greedy answer")
    if model is None and (vllm is None or _is_trainers(vllm)):
        raise ValueError("model is None: only a vllm.LLM generates without one")
    problems = _problems_of(dataset, tokenizer, chat_template_kwargs or {})
    # Greedy answers first, which tell how long samples are going to be. Longest prompts first, as far as answers are
    # of one length: what does not fit into memory shows at once.
    by_prompt = sorted(problems, key=lambda problem: -len(problem.prompt_ids))
    tasks = [Task(problem, 0.0, 0) for problem in by_prompt]
    tasks += [Task(problem, float(temperature), k) for problem in by_prompt for k in range(samples_per_item)]

    main_process = accelerator is None or accelerator.is_main_process
    file = None
    if answers_file is not None:
        depends_on = {
            "max_new_tokens": max_new_tokens,
            **({"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")} if model is not None else {}),
            "backend": "transformers" if vllm is None else "vllm",
            **({"temperature": float(temperature), "seed": seed} if samples_per_item else {}),
            **({"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}),
            **(settings or {}),
        }
        file = AnswersFile(Path(answers_file), depends_on)
    answers = _from_main_process(accelerator, lambda: file.begin(tasks) if file is not None else [])
    found = {key_of(answer): answer for answer in answers}
    lengths = KnownLengths([*earlier, *answers])

    missing = [task for task in tasks if task.key not in found]
    with tqdm(
        total=len(tasks),
        initial=len(found),
        desc=description,
        unit="answer",
        leave=None,  # not below another bar
        disable=not main_process or description is None,
    ) as progress:

        def keep(answers: list[Answer]) -> None:
            if file is not None and main_process:
                append_answers(file.path, answers)
            found.update({key_of(answer): answer for answer in answers})
            lengths.add(answers)
            progress.update(len(answers))

        _generate_all(
            model,
            tokenizer,
            missing,
            lengths,
            keep,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            accelerator=accelerator,
            vllm=vllm,
            end_ids=end_ids,
            unwrap_options=unwrap_options or {},
            shows_progress=not progress.disable,
        )
    order = {problem.id: position for position, problem in enumerate(problems)}
    answers = sorted(found.values(), key=lambda answer: (order[answer.id], answer.temperature, answer.sample))
    if file is not None and main_process:
        write_answers(file.path, answers)
    return Evaluation(answers, figures_of(answers, seed=seed), generated=len(missing))


class AnswersFile:
    """The answers of an evaluation on disk, and beside them what they depend on.

    Args:
        path (`Path`):
            The file; another one, whose name is this one's and `.settings.yaml`, holds the settings.
        settings (`Mapping[str, Any]`):
            What the answers depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = shorten_home(json.loads(json.dumps(dict(settings), default=str)))  # as they are read back
        self.settings_path = path.with_name(path.name + SETTINGS_ENDING)

    def begin(self, tasks: Sequence[Task]) -> list[Answer]:
        """Read the answers that are there, and see to it that others can be appended.

        Raises:
            ValueError: If they are not of these problems, or were generated under other settings.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        answers: list[Answer] = []
        if self.path.is_file() and self.path.stat().st_size > 0:
            settings = self._check_settings()
            answers = [answer.graded() for answer in read_answers(self.path, ignore_unfinished_line=True)]
            self._check_answers(answers, {task.key: task for task in tasks})
            # Of greedy answers alone it does not say how samples are drawn, and goes on saying it without any.
            self.settings = {**settings, **self.settings}
        write_at_once(
            self.settings_path, [yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True).encode()]
        )
        return answers

    def _check_settings(self) -> dict[str, Any]:
        way_out = f"name another file for the answers, or delete {self.path}"
        try:
            settings = shorten_home(yaml.safe_load(self.settings_path.read_text()))
        except FileNotFoundError:
            raise ValueError(
                f"{self.path} has answers, and {self.settings_path.name}, which says how they were generated, is not "
                f"beside it: {way_out}"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError):
            settings = None
        if not isinstance(settings, dict):
            raise ValueError(f"{self.settings_path} is no mapping of settings to values: {way_out}")
        for name in [*self.settings, *settings]:
            if name in OF_SAMPLES and not (name in self.settings and name in settings):
                continue
            now, before = self.settings.get(name), settings.get(name)
            if now != before:
                raise ValueError(
                    f"{self.path} has answers that were generated with {name} {before!r}, and now it is {now!r}: "
                    f"{way_out}"
                )
        return settings

    def _check_answers(self, answers: Sequence[Answer], tasks: Mapping[Any, Task]) -> None:
        way_out = "name another file for the answers, or delete it"
        seen = set()
        for answer in answers:
            key = key_of(answer)
            what = f"sample {answer.sample} at temperature {answer.temperature} of problem {str(answer.id)[:60]!r}"
            if key not in tasks:
                raise ValueError(f"{self.path} has {what}, which is not asked for: {way_out}")
            if key in seen:
                raise ValueError(f"{self.path} has {what} twice: {way_out}")
            seen.add(key)
            problem = tasks[key].problem
            for column, before, now in (
                ("prompt", answer.prompt, problem.prompt),
                ("answer", answer.answer, problem.answer),
            ):
                if before != now:
                    raise ValueError(f"{self.path} has {what} with another {column!r} than it has now: {way_out}")
            if answer.tokens is None or answer.finish_reason is None:
                raise ValueError(f"{self.path} has {what} without its tokens and finish_reason: {way_out}")


def _from_main_process(accelerator: Accelerator | None, read: Callable[[], list[Answer]]) -> list[Answer]:
    """What the main process finds, or why it does not, on all processes: others may not see its files."""
    if accelerator is None or accelerator.num_processes == 1:
        return read()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = read()
        except (ValueError, OSError) as error:
            outcome[1] = error
    answers, refusal = broadcast_object_list(outcome)
    if refusal is not None:
        raise refusal
    return answers


def _problems_of(
    dataset: "Dataset", tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> list[Problem]:
    """The rows, with what is kept of them in the form in which it is read back."""
    dataset = dataset.with_format(None)
    ids = dataset["id"] if "id" in dataset.column_names else range(len(dataset))
    return [
        Problem(
            id=name,
            prompt=prompt,
            answer=answer if isinstance(answer, str | int | float) else reference_to_text(answer),
            prompt_ids=to_ids(tokenizer, prompt, **chat_template_kwargs),
        )
        for name, prompt, answer in zip(ids, dataset["prompt"], dataset["answer"], strict=True)
    ]


def _is_trainers(vllm: Any) -> bool:
    """Whether a vLLM is a trainer's, which brings it the policy's weights."""
    return hasattr(vllm, "sync_weights")


def _bring_to(device: torch.device, model: nn.Module) -> None:
    """Move a model to the processes' device, if it is not there: DeepSpeed does so only when training begins."""
    if next(model.parameters()).device.type != device.type:
        model.to(device)


def _generate_all(
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    lengths: KnownLengths,
    keep: Callable[[list[Answer]], None],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    accelerator: Accelerator | None,
    vllm: Any,
    end_ids: Sequence[int] | None,
    unwrap_options: Mapping[str, Any],
    shows_progress: bool,
) -> None:
    """Generate the answers that are asked for, and `keep` each chunk of them; all processes call it together."""
    if not tasks:
        return
    process_index = accelerator.process_index if accelerator is not None else 0
    num_processes = accelerator.num_processes if accelerator is not None else 1
    if model is not None and accelerator is not None and not compat.holds_parts_of_parameters(model):
        _bring_to(accelerator.device, model)
    is_trainers = vllm is not None and _is_trainers(vllm)
    if is_trainers:
        with torch.no_grad():
            vllm.sync_weights()  # training does it when it next generates
    within: AbstractContextManager[Any] = nullcontext(model)
    if vllm is None and model is not None and accelerator is not None:
        within = _unwrapped(model, accelerator, unwrap_options)
    with within as policy, _undisturbed(policy):  # training goes on as if there had been no evaluation
        end_ids = end_ids_of(tokenizer, _generation_config(policy)) if end_ids is None else end_ids
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "end_ids": end_ids}
        complete: Callable[..., list[Completion]]
        if vllm is None:
            complete = partial(generate, policy, tokenizer, **options)
        elif is_trainers:
            complete = partial(generate_with_trainers_vllm, vllm, tokenizer, **options)
        else:
            complete = partial(generate_with_vllm, vllm, tokenizer, shows_progress=shows_progress, **options)
        at_once = (batch_size if vllm is None else ANSWERS_OF_VLLM_AT_ONCE) * num_processes
        for chunk in in_chunks(tasks, lengths, at_once):
            requests = [
                Request(task.problem.prompt_ids, task.temperature, stream_of(seed, task.problem.id, task.sample))
                for task in chunk
            ]
            # Each process takes as many, long and short ones, the last one again and again if need be: where weights
            # are shared out, all processes must generate equally often.
            share = -(-len(chunk) // num_processes)
            requests += [requests[-1]] * (share * num_processes - len(chunk))
            mine = requests[process_index::num_processes]
            if is_trainers:
                # processes that share a copy of the model sample for all of them, and must draw the same
                drawn = complete(mine, seed=requests[0].stream + process_index // vllm.tensor_parallel_size)
            else:
                drawn = complete(mine)
            if num_processes > 1:
                drawn = gather_object(drawn)  # process after process
                drawn = [drawn[process * share + turn] for turn in range(share) for process in range(num_processes)]
            keep([_to_answer(task, completion) for task, completion in zip(chunk, drawn, strict=False)])


@contextmanager
def _unwrapped(model: nn.Module, accelerator: Accelerator, options: Mapping[str, Any]) -> Iterator[PreTrainedModel]:
    """Within it the policy can generate, whatever holds its weights."""
    taken = signature(unwrap_model_for_generation).parameters  # before TRL 1.16 not how checkpointing goes on
    options = {name: value for name, value in options.items() if name in taken}
    with (
        unwrap_model_for_generation(model, accelerator, **options) as policy,
        torch.no_grad(),
        DistributedBackend(accelerator).summon_full_params(model, recurse=False),  # those outside of FSDP's units
    ):
        yield policy


def _undisturbed(policy: nn.Module | None) -> AbstractContextManager[None]:
    return nullcontext() if policy is None else undisturbed(policy, next(policy.parameters()).device)


def _generation_config(policy: Any) -> Any:
    """The model's generation settings, whatever it is wrapped in for training."""
    while policy is not None and not hasattr(policy, "generation_config"):
        policy = getattr(policy, "module", None)
    return policy and policy.generation_config


def _to_answer(task: Task, completion: Completion) -> Answer:
    problem = task.problem
    answer = Answer(
        id=problem.id,
        sample=task.sample,
        temperature=task.temperature,
        prompt=problem.prompt,
        completion=completion.text,
        answer=problem.answer,
        tokens=completion.tokens,
        finish_reason=completion.finish_reason,
    )
    return answer.graded()
