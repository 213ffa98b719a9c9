"""GSM8K (Cobbe et al., arXiv 2110.14168) in the columns that the rewards and `GRPOTrainer` expect."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rewards.extract import HASH_MARKER, extract_hash_answer
from .prompts import SYSTEM_PROMPT, format_solution, to_prompt


if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = "openai/gsm8k"
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
GZIP_START = b"\x1f\x8b"

# GSM8K's solutions carry the results of a calculator in place: "48/2 = <<48/2=24>>24".
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


def load_gsm8k(
    name_or_path: str = HUB_NAME,
    split: str = "train",
    config: str = "main",
    system_prompt: str | None = SYSTEM_PROMPT,
    with_example: bool = False,
) -> "Dataset":
    """Load GSM8K, from the hub or from a copy on disk.

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
    from datasets import Dataset, load_dataset

    path = Path(name_or_path).expanduser()
    if path.is_dir():
        rows = [row for file in _files_of_split(path, split, config) for row in _read_rows(file)]
    elif path.is_file() or path.name.endswith(FILE_ENDINGS):
        rows = list(_read_rows(path))
    else:
        hub_rows = load_dataset(name_or_path, config, split=split)
        rows = [(f"{name_or_path} ({split}), row {index}", row) for index, row in enumerate(hub_rows)]
    if not rows:
        raise ValueError(f"{name_or_path} has no rows ({split}): it must hold one JSON object a line, or parquet")
    return Dataset.from_list([_to_columns(place, row, system_prompt, with_example) for place, row in rows])


def _files_of_split(folder: Path, split: str, config: str) -> list[Path]:
    """The files of a split in a folder: `train.jsonl`, or the hub's `main/train-00000-of-00001.parquet`."""
    for candidate in (folder / config, folder, folder / "data"):
        for ending in FILE_ENDINGS:
            files = sorted([*candidate.glob(f"{split}{ending}"), *candidate.glob(f"{split}[-_.]*{ending}")])
            if files:
                return files
    raise FileNotFoundError(
        f"{folder} has no {split}.jsonl or {split}.parquet; name the file itself, or another split"
    )


def _read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with the place it stands at."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            table = parquet.read_table(file)
        except ArrowException as error:
            raise ValueError(f"{file}: not a parquet file ({error})") from None
        for index, row in enumerate(table.to_pylist()):
            yield f"{file}, row {index}", row
        return
    for number, line in enumerate(_read_lines(file), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            # whole numbers are not read as `int`, which refuses long ones: no column that counts is a number
            row = json.loads(line.decode(), parse_int=Decimal)
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not a text in UTF-8 ({error})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not a JSON object a line ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: not a JSON object but a {type(row).__name__}")
        yield place, row


def _read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file that may be gzipped, whatever its name, without a byte order mark."""
    with file.open("rb") as stream:
        is_gzipped = stream.read(len(GZIP_START)) == GZIP_START
    with gzip.open(file) if is_gzipped else file.open("rb") as lines:
        try:
            for number, line in enumerate(lines):
                yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{file}: not a whole gzip file ({error})") from None


def _to_columns(place: str, row: dict[str, Any], system_prompt: str | None, with_example: bool) -> dict[str, Any]:
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{place}: no text in column {column!r}; its columns are {', '.join(sorted(row)) or 'none'}"
            )
        try:
            row[column].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: no valid text in column {column!r}, half of a character ({error})") from None
    answer = extract_hash_answer(row["answer"])
    if answer is None:
        raise ValueError(f"{place}: the answer has no '{HASH_MARKER}' followed by the final answer")
    reasoning = CALCULATOR_ANNOTATION.sub("", row["answer"].rpartition(HASH_MARKER)[0]).strip()
    return {
        "prompt": to_prompt(row["question"], system_prompt, with_example),
        "answer": answer,
        "solution": format_solution(reasoning, answer),
    }
