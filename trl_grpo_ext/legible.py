"""What people see of a training: completions in a terminal, a notebook's table, a model card.

What is written to files and trackers stays TRL's.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .embedded_policy import EMBEDDED_POLICY
from .report.about import name_of_model
from .rewards.text import completion_to_text


# Of a prompt, which its reader knows, and of a completion.
PROMPT_CHARS, COMPLETION_CHARS = 160, 400
# Completions that are shown where nobody has said how many.
NUM_COMPLETIONS = 4
# Reward functions that have a column each.
MOST_REWARD_COLUMNS = 2
# What a model card of TRL says where the model it began with is no hub's, and where it is not pushed to one.
_NO_BASE_MODEL, _NO_HUB_MODEL = "[None](https://huggingface.co/None)", 'model="None"'


def show_completions(
    weights: Mapping[str, float],
    show: Callable[..., None],
    prompts: list[Any],
    completions: list[Any],
    rewards: Mapping[str, list[float]],
    advantages: list[float],
    step: int,
    num_samples: int | None = None,
    extra: Mapping[str, list[Any]] | None = None,
) -> None:
    """TRL's table of completions, readable on a terminal of 100 columns.

    Texts are cut, of a conversation the last message is shown, and of more than two reward functions the weighted sum
    has a column, with each one's score in a cell beside it. Where nobody has said how many, the completions with the
    two highest and the two lowest advantages are shown, and not the whole batch.

    Args:
        weights (`Mapping[str, float]`):
            The reward functions', by their names. TRL has one column for functions of the same name, the last one's.
        show (`Callable`):
            TRL's function.
        prompts, completions, rewards, advantages, step, num_samples, extra:
            What TRL calls it with.
    """
    columns: dict[str, list[Any]] = {
        name: list(values) for name, values in (extra or {}).items() if any(value is not None for value in values)
    }
    if len(rewards) > MOST_REWARD_COLUMNS:
        rows = list(zip(*rewards.values(), strict=True))
        names = [name.removesuffix("_reward_func") for name in rewards]
        columns = {
            "rewards": [
                "\n".join(f"{name} {score:.4g}" for name, score in zip(names, row, strict=True)) for row in rows
            ],
            **columns,
        }
        rewards = {"reward": [_weighted(row, [weights[name] for name in rewards]) for row in rows]}
    shown = list(range(len(prompts)))
    if num_samples is None and len(shown) > NUM_COMPLETIONS:
        by_advantage = sorted(shown, key=lambda row: -advantages[row])
        half = NUM_COMPLETIONS // 2
        shown = [*by_advantage[:half], *by_advantage[-half:]]

    def chosen(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in shown]

    show(
        [_cut(_last_message(prompt), PROMPT_CHARS) for prompt in chosen(prompts)],
        [_cut(completion_to_text(completion), COMPLETION_CHARS) for completion in chosen(completions)],
        {name: chosen(values) for name, values in rewards.items()},
        chosen(advantages),
        step,
        num_samples,
        extra={
            name: ["-" if value is None else _cut(str(value), PROMPT_CHARS) for value in chosen(values)]
            for name, values in columns.items()
            if len(values) == len(prompts)
        },
    )


def _weighted(scores: Sequence[float], weights: Sequence[float]) -> float:
    return sum(score * weight for score, weight in zip(scores, weights, strict=True) if score == score)


def _last_message(prompt: Any) -> str:
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], Mapping):
        return completion_to_text({"content": prompt[-1].get("content")})
    return completion_to_text(prompt)


def _cut(text: str, chars: int) -> str:
    """A text, or of a long one beginning and end."""
    half = chars // 2
    return text if len(text) <= chars else f"{text[:half]} [...] {text[-half:]}"


def show_rewards_in_notebooks(trainer: Any) -> None:
    """Put [`~notebook.NotebookProgress`] in the place of transformers' own, where a trainer has that."""
    of_transformers = sys.modules.get("transformers.utils.notebook")  # imported in notebooks alone: it needs IPython
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if of_transformers is not None and type(callback) is of_transformers.NotebookProgressCallback:
            from .notebook import NotebookProgress

            callbacks[place] = NotebookProgress()


def name_base_model(trainer: Any) -> None:
    """Let a model card that TRL has written name base and result, where these are folders and not a hub's."""
    card = Path(trainer.args.output_dir, "README.md")
    name = name_of_model(trainer)
    called = "the embedded policy of trl_grpo_ext" if name == EMBEDDED_POLICY else f"`{Path(name).name}`"
    text = card.read_text(encoding="utf-8")
    result = f'model="{Path(trainer.args.output_dir).resolve().name}"'
    named = text.replace(_NO_BASE_MODEL, called).replace(_NO_HUB_MODEL, result)
    if named != text:
        card.write_text(named, encoding="utf-8")
