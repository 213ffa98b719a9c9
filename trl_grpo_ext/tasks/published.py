"""Published data sets by name, in the columns that the rewards and `GRPOTrainer` expect."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .arithmetic import load_arithmetic
from .problems import HUB_NAMES, load_problems
from .prompts import SYSTEM_PROMPT


if TYPE_CHECKING:
    from datasets import Dataset


def load_gsm8k(
    name_or_path: str = HUB_NAMES["gsm8k"],
    split: str = "train",
    config: str = "main",
    system_prompt: str | None = SYSTEM_PROMPT,
    with_example: bool = False,
) -> "Dataset":
    """Load GSM8K (Cobbe et al., arXiv 2110.14168), from the hub or from a copy on disk.

    Args:
        name_or_path (`str`, *optional*, defaults to `"openai/gsm8k"`):
            A name on the hub; a JSON Lines file (gzipped or not) or a parquet file in GSM8K's own format (`question`,
            and `answer` with `####`); or a folder with such files, as the hub lays them out or simply `train.jsonl`
            and `test.jsonl`.
        split (`str`, *optional*, defaults to `"train"`):
            Split on the hub or in the folder. A single file is taken whole, whatever its split.
        config (`str`, *optional*, defaults to `"main"`):
            Configuration on the hub; in a folder, the subfolder of that name is preferred.
        system_prompt (`str`, *optional*):
            System message before each question; `None` leaves it out.
        with_example (`bool`, *optional*, defaults to `False`):
            Put a question with its answer in the right format before each, for models that do not find it themselves.

    Returns:
        `datasets.Dataset`:
            Columns `prompt` (messages), `answer` (what follows `####`, thousands commas kept) and `solution` (the
            reference completion in the system prompt's format, without the calculator's annotations).

    Raises:
        FileNotFoundError: If a folder holds no file of the split.
        ValueError: If there are no rows, or a row is no JSON object in UTF-8, lacks a column, or has no `####`; the
            message names file and line.
    """
    return load_problems(
        name_or_path,
        split=split,
        config=config,
        question_column="question",
        answer_column="answer",
        answer_extractor="hash",
        system_prompt=system_prompt,
        with_example=with_example,
    )


def load_math(name_or_path: str = HUB_NAMES["math"], split: str = "train", **options: Any) -> "Dataset":
    r"""MATH (Hendrycks et al., arXiv 2103.03874): answers are what the solutions box, as LaTeX.

    Args:
        name_or_path (`str`, *optional*, defaults to `"EleutherAI/hendrycks_math"`):
            A name on the hub (`HuggingFaceH4/MATH-500` with its split `test` is another), a folder or a file, with the
            columns `problem` and `solution`, and `answer` where they have one.
        split (`str`, *optional*, defaults to `"train"`):
            Split on the hub or in the folder.
        **options:
            As for [`load_problems`]; without a `config` there, all seven subjects are loaded.
    """
    return load_problems(name_or_path, split=split, **options)


def load_svamp(name_or_path: str = HUB_NAMES["svamp"], split: str = "train", **options: Any) -> "Dataset":
    """SVAMP (Patel et al., arXiv 2103.07191): the formula that gives the answer is the solution.

    Args:
        name_or_path (`str`, *optional*, defaults to `"ChilleD/SVAMP"`):
            A name on the hub, a folder or a file, with the columns `Body`, `Question` (or both in `question_concat`)
            and `Answer`.
        split (`str`, *optional*, defaults to `"train"`):
            Split on the hub or in the folder.
        **options:
            As for [`load_problems`].
    """
    return load_problems(name_or_path, split=split, **options)


def load_asdiv(name_or_path: str = HUB_NAMES["asdiv"], split: str = "validation", **options: Any) -> "Dataset":
    """ASDiv (Miao et al., arXiv 2106.15772): answers are without their units; the formula is the solution.

    Args:
        name_or_path (`str`, *optional*, defaults to `"EleutherAI/asdiv"`):
            A name on the hub, a folder or a file, with the columns `body`, `question` and `answer`.
        split (`str`, *optional*, defaults to `"validation"`):
            Split on the hub, which has this one alone, or in the folder.
        **options:
            As for [`load_problems`].
    """
    return load_problems(name_or_path, split=split, **options)


TASKS: dict[str, Callable[..., "Dataset"]] = {
    "arithmetic": load_arithmetic,
    "asdiv": load_asdiv,
    "gsm8k": load_gsm8k,
    "math": load_math,
    "svamp": load_svamp,
}
