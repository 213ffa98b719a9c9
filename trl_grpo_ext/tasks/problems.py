"""Anybody's questions and answers as a data set with the columns `prompt`, `answer`, `id` and `solution`."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..extras import require
from ..rewards.extractors import AnswerExtractor, get_answer_extractor
from .arithmetic import load_arithmetic
from .files import Row, files_of, is_on_disk, read_rows
from .layouts import Layout, Problem, choose_layout
from .prompts import SYSTEM_PROMPT, to_prompt


if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

ARITHMETIC = "arithmetic"
# Where published data sets are on the hub, by a short name of their own. MATH has a configuration for each subject.
HUB_NAMES = {
    "gsm8k": "openai/gsm8k",
    "math": "EleutherAI/hendrycks_math",
    "svamp": "ChilleD/SVAMP",
    "asdiv": "EleutherAI/asdiv",
}
_MATH_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"),
    *("prealgebra", "precalculus"),
)
# What they are called there, where nobody names another one.
CONFIGS: dict[str, tuple[str, ...]] = {"openai/gsm8k": ("main",), "EleutherAI/hendrycks_math": _MATH_SUBJECTS}

# What is larger is written to datasets' cache and read from there as it is needed, instead of being held in memory.
BYTES_IN_MEMORY = 16 * 2**20
_ROWS_AT_ONCE = 1000
DATASETS, INSTALL_DATASETS = ("datasets",), "pip install datasets"
_OPTIONAL_COLUMNS = ("id", "solution")


def load_problems(
    name_or_path: str,
    *,
    split: str = "train",
    config: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    answer_extractor: AnswerExtractor | None = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    with_example: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
) -> "Dataset":
    """Load problems from a file, a folder or the hub.

    A large file is not held in memory: what is made of it is written to the cache of `datasets` once, under a lock,
    and memory-mapped from there, until the file changes.

    Args:
        name_or_path (`str`):
            A JSON Lines, JSON, CSV or parquet file (the first three gzipped or not); a folder with files that are
            called by their split; a name on the hub; `"gsm8k"`, `"math"`, `"svamp"` or `"asdiv"` for their own place
            there; or `"arithmetic"`, for problems that are made from the seed.
        split (`str`, *optional*, defaults to `"train"`):
            Split on the hub or in a folder. A single file is taken whole, whatever its split.
        config (`str`, *optional*):
            Configuration on the hub; in a folder, the subfolder of that name is preferred.
        question_column (`str`, *optional*):
            The column with the question, a text or messages. Where no column is named, they are found by what a
            published data set calls them (see [`trl_grpo_ext.tasks.layouts`]), and else are `question` and `answer`.
        answer_column (`str`, *optional*):
            The column with the answer.
        answer_extractor (`str`, `Callable` or a tuple of these, *optional*):
            How the answer is taken out of its column, as rewards take it out of a completion, see
            [`get_answer_extractor`]: `"hash"` (what follows `####`), `"boxed"` (the last `\\boxed{}`), `"tag"` (what
            the answer tag encloses), `"none"` (as it is), ... Where it is left out, `"hash"` if the first row has
            `####`, else `"none"`.
        system_prompt (`str`, *optional*):
            System message before each question; `None` leaves it out.
        with_example (`bool`, *optional*, defaults to `False`):
            Put a question with its answer in the right format before each, for models that do not find it themselves.
        max_rows (`int`, *optional*):
            Take the first rows only.
        seed (`int`, *optional*, defaults to `0`):
            Seed of problems that are made.

    Returns:
        `datasets.Dataset`:
            Columns `prompt` (messages) and `answer`; `id` where all rows have one, and `solution` (a completion with
            the reference, tags included) where all rows have how their answer is found.

    Raises:
        FileNotFoundError: If there is no such file, or no file of the split.
        ValueError: If there are no rows, or a row has no question or no answer; the message is one line and names
            file and line.
    """
    require(f"loading {name_or_path}", DATASETS, INSTALL_DATASETS)
    _check_options(answer_extractor, max_rows)
    if name_or_path == ARITHMETIC:
        return _make_arithmetic(split, max_rows, seed, system_prompt, with_example)
    hub_name = HUB_NAMES.get(name_or_path, name_or_path)
    is_on_hub = _is_on_hub(name_or_path)
    configs = _configs_of(hub_name, is_on_hub, config)
    columns: dict[str, Any] = {
        "question_column": question_column,
        "answer_column": answer_column,
        "answer_extractor": answer_extractor,
    }
    shape: dict[str, Any] = {"system_prompt": system_prompt, "with_example": with_example}
    if is_on_hub:
        dataset = _load_from_hub(hub_name, configs, split, max_rows)
        return to_problems(dataset, **columns, **shape, name=f"{hub_name} ({split})")
    return load_files(
        files_of(name_or_path, split, configs), partial(choose_layout, **columns), partial(_to_row, **shape), max_rows
    )


def read_problems(
    name_or_path: str,
    *,
    split: str = "train",
    config: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    answer_extractor: AnswerExtractor | None = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    with_example: bool = False,
    max_rows: int | None = None,
) -> list[Row]:
    """The rows that [`load_problems`] makes of a file or a folder, in memory, without `datasets`.

    What is not on disk (the hub, problems from a seed) is loaded with `datasets`, and is rows afterwards.

    Args:
        name_or_path, split, config, question_column, answer_column, answer_extractor, system_prompt, with_example:
            As for [`load_problems`].
        max_rows (`int`, *optional*):
            Take the first rows only.

    Returns:
        `list[dict]`:
            Each with `prompt` (messages) and `answer`; with `id` and `solution` where all rows have one.

    Raises:
        FileNotFoundError: If there is no such file, or no file of the split.
        ValueError: If there are no rows, or a row has no question or no answer; the message is one line and names
            file and line.
        PackageMissingError: If `datasets`, or `pyarrow` for a parquet file, is needed and not installed.
    """
    options: dict[str, Any] = {
        "question_column": question_column,
        "answer_column": answer_column,
        "answer_extractor": answer_extractor,
    }
    shape: dict[str, Any] = {"system_prompt": system_prompt, "with_example": with_example}
    if name_or_path == ARITHMETIC or _is_on_hub(name_or_path):
        return list(load_problems(name_or_path, split=split, config=config, **options, **shape, max_rows=max_rows))
    _check_options(answer_extractor, max_rows)
    files = files_of(name_or_path, split, _configs_of(name_or_path, False, config))
    layout = _layout_of(files, partial(choose_layout, **options))
    rows = list(_rows_of(list(map(str, files)), layout, partial(_to_row, **shape), max_rows))
    partly_empty = [column for column in _OPTIONAL_COLUMNS if any(row[column] is None for row in rows)]
    return [{name: value for name, value in row.items() if name not in partly_empty} for row in rows]


def _check_options(answer_extractor: AnswerExtractor | None, max_rows: int | None) -> None:
    if answer_extractor is not None:
        get_answer_extractor(answer_extractor)  # refuses what is none
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")


def _is_on_hub(name_or_path: str) -> bool:
    return name_or_path in HUB_NAMES or not is_on_disk(name_or_path)


def _configs_of(hub_name: str, is_on_hub: bool, config: str | None) -> tuple[str, ...]:
    """Configurations on the hub, or subfolders: in a folder, MATH's subjects are found by their names."""
    if config is not None:
        return (config,)
    return CONFIGS.get(hub_name, () if is_on_hub else _MATH_SUBJECTS)


def to_problems(
    dataset: "Dataset | IterableDataset",
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
    answer_extractor: AnswerExtractor | None = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    with_example: bool = False,
    keeps_columns: bool = False,
    name: str = "the data set",
) -> Any:
    """A data set or a stream that has been loaded, as [`load_problems`] gives it.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            The rows. A stream stays one.
        question_column, answer_column, answer_extractor, system_prompt, with_example:
            As for [`load_problems`].
        keeps_columns (`bool`, *optional*, defaults to `False`):
            Keep the other columns, for rewards that look at them; an `id` or a `solution` among them stays as it is.
        name (`str`, *optional*, defaults to `"the data set"`):
            What messages call it.
    """
    require("to_problems", DATASETS, INSTALL_DATASETS)
    from datasets import Dataset, Features

    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} has no rows")
    layout = choose_layout(first, question_column, answer_column, answer_extractor)
    convert = partial(_to_row, system_prompt=system_prompt, with_example=with_example)
    problem = _read(f"{name}, row 0", first, layout)
    kept = set(first) if keeps_columns else set()
    optional = [column for column in _OPTIONAL_COLUMNS if column not in kept and getattr(problem, column) is not None]
    made = ["prompt", "answer", *optional]
    replaced = [column for column in first if column not in kept or column in made]
    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):  # else a column of numbers, when its new texts are digits, would be numbers again
        texts = _features()
        kept_features = {column: kind for column, kind in dataset.features.items() if column not in replaced}
        options["features"] = Features({**kept_features, **{column: texts[column] for column in made}})
    return dataset.map(
        partial(_convert, layout=layout, to_row=convert, columns=made, name=name),
        with_indices=True,
        remove_columns=replaced,
        **options,
    )


def load_files(
    files: list[Path],
    choose: Callable[[Row], Layout],
    to_row: Callable[[Problem], Row],
    max_rows: int | None = None,
) -> "Dataset":
    """The problems of files, in memory if they are small, else memory-mapped from the cache."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    layout = _layout_of(files, choose)
    arguments: dict[str, Any] = {
        "files": [str(file.resolve()) for file in files],
        "layout": layout,
        "to_row": to_row,
        "max_rows": max_rows,
        # what else decides on the result: with another one, it is not taken from the cache
        "identity": (__version__, [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]),
    }
    features = _features()
    schema = features.arrow_schema
    tables, size, rows = [], 0, _rows_of(**arguments)
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        tables.append(pa.Table.from_pylist(chunk, schema))
        size += tables[-1].nbytes
        if size > BYTES_IN_MEMORY:
            break
    if not chunk:
        dataset = Dataset(pa.concat_tables(tables))
    else:
        del tables, chunk, rows
        try:
            dataset = Dataset.from_generator(_rows_of, features=features, gen_kwargs=arguments)
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
    partly_empty = [column for column in _OPTIONAL_COLUMNS if dataset.data.column(column).null_count]
    return dataset.remove_columns(partly_empty)


def _layout_of(files: list[Path], choose: Callable[[Row], Layout]) -> Layout:
    """How the rows of files are read, by the first of them."""
    layout = next((choose(row) for file in files for _, row in read_rows(file)), None)
    if layout is None:
        raise ValueError(
            f"{_listed(files)} has no rows: each problem must be one, of JSON Lines, JSON, CSV or parquet"
        )
    return layout


def _rows_of(
    files: list[str], layout: Layout, to_row: Callable[[Problem], Row], max_rows: int | None, identity: Any = None
) -> Iterator[Row]:
    rows = (row for file in files for row in read_rows(Path(file)))
    for place, row in islice(rows, max_rows):
        yield to_row(_read(place, row, layout))


def _read(place: str, row: Mapping[str, Any], layout: Layout) -> Problem:
    try:
        return layout(dict(row))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _to_row(problem: Problem, system_prompt: str | None, with_example: bool) -> Row:
    return {
        "prompt": to_prompt(problem.question, system_prompt, with_example),
        "answer": problem.answer,
        "id": problem.id,
        "solution": problem.solution,
    }


def _convert(
    row: Row, index: int, layout: Layout, to_row: Callable[[Problem], Row], columns: list[str], name: str
) -> Row:
    """A row of a data set of which it is known already what all rows have."""
    made = to_row(_read(f"{name}, row {index}", row, layout))
    return {column: made[column] for column in columns}


def _load_from_hub(name: str, configs: tuple[str, ...], split: str, max_rows: int | None) -> "Dataset":
    from datasets import concatenate_datasets, load_dataset

    parts = [load_dataset(name, config, split=split) for config in configs or (None,)]
    dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return dataset if max_rows is None else dataset.select(range(min(max_rows, len(dataset))))


def _make_arithmetic(
    split: str, max_rows: int | None, seed: int, system_prompt: str | None, with_example: bool
) -> "Dataset":
    if with_example:
        raise ValueError("arithmetic problems are not shown with an example: the embedded policy knows the format")
    size = max_rows or (4096 if split == "train" else 200)
    return load_arithmetic("heldout" if split == "test" else split, size, seed, system_prompt)  # type: ignore[arg-type]


def _features() -> "Features":
    from datasets import Features, List, Value

    text = Value("string")
    message = {"role": text, "content": text}
    return Features({"prompt": List(message), "answer": text, "id": text, "solution": text})


def _listed(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({', '.join(file.name for file in files)})"


def hold_out(problems: "Dataset", items: int, name: str) -> tuple["Dataset", "Dataset"]:
    """Split the last rows off, for a file that has no test split.

    Args:
        problems (`Dataset`):
            All of its problems.
        items (`int`):
            How many are held out.
        name (`str`):
            What the data set is called in the error.

    Returns:
        `tuple[Dataset, Dataset]`:
            What is left, and what is held out.

    Raises:
        ValueError: If nothing would be left.
    """
    if len(problems) <= items:
        raise ValueError(f"{name} has {len(problems)} rows, too few to hold out {items}")
    cut = len(problems) - items
    return problems.select(range(cut)), problems.select(range(cut, len(problems)))
