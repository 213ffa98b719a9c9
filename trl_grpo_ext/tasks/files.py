"""From a file or a folder to its rows, one at a time, each with the place where it stands."""

import codecs
import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

from ..extras import require


Row: TypeAlias = dict[str, Any]

# In this order of preference, where a folder has the same split in several forms.
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
GZIP_START = b"\x1f\x8b"
PARQUET_ROWS = 1024  # that are in memory at once


def is_on_disk(name_or_path: str) -> bool:
    """Whether a name means a file or a folder: one that is there, or a missing one that is named like a file."""
    path = Path(name_or_path).expanduser()
    return path.exists() or path.name.endswith(FILE_ENDINGS)


def files_of(name_or_path: str, split: str, configs: Sequence[str] = ()) -> list[Path]:
    """The files of a split: the file itself if it is one; in a folder `train.jsonl`, or as the hub lays them out.

    Args:
        name_or_path (`str`):
            A file or a folder.
        split (`str`):
            The split to look for in a folder, such as `"train"`.
        configs (`Sequence[str]`):
            Subfolders that are looked into before the folder itself; what all of them hold is one data set.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        return [path]
    for folders in ([path / config for config in configs], [path], [path / "data"]):
        for ending in FILE_ENDINGS:
            files = [
                file
                for folder in folders
                for file in sorted([*folder.glob(f"{split}{ending}"), *folder.glob(f"{split}[-_.]*{ending}")])
            ]
            if files:
                return files
    raise FileNotFoundError(f"{path} has no {split}.jsonl or {split}.parquet; name the file itself, or another split")


def read_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON Lines, JSON, CSV or parquet file, each with its place: `train.jsonl, line 3`.

    Raises:
        ValueError: If the file is none of these, or a line is broken; the message is one line, with the place.
    """
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(file)
    if name.endswith(".csv"):
        return _read_csv(file)
    if name.endswith(".json") and _begins_with_a_list(file):
        return _read_json(file)
    return _read_json_lines(file)


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    require(f"reading {file}", ("pyarrow",), "pip install pyarrow")
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as content:
            index = 0
            for batch in content.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield f"{file}, row {index}", row
                    index += 1
    except ArrowException as error:
        raise ValueError(f"{file}: not a parquet file ({error})") from None


def _read_json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(unpacked_lines(file), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            yield place, _check_row(place, _parse(place, line, "a JSON object a line"))


def _read_json(file: Path) -> Iterator[tuple[str, Row]]:
    """A file that is one list: JSON knows no rows, so all of it is in memory at once."""
    rows = _parse(str(file), b"".join(unpacked_lines(file)), "a list of JSON objects")
    for index, row in enumerate(rows):
        place = f"{file}, row {index}"
        yield place, _check_row(place, row)


def _read_csv(file: Path) -> Iterator[tuple[str, Row]]:
    lines = (_decode(f"{file}, line {number}", line) for number, line in enumerate(unpacked_lines(file), start=1))
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if None in row:
                raise ValueError(f"{place}: there are more fields than columns ({', '.join(reader.fieldnames or ())})")
            # an empty field is no value, as in every reader of such files
            yield place, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.reader.line_num}: not a line of CSV ({error})") from None


def _begins_with_a_list(file: Path) -> bool:
    return next((line.lstrip()[:1] for line in unpacked_lines(file) if line.strip()), b"") == b"["


def _parse(place: str, text: bytes, wanted: str) -> Any:
    try:
        # Numbers keep their digits: `int` refuses long ones, and `float` rounds.
        return json.loads(_decode(place, text), parse_int=Decimal, parse_float=Decimal)
    except (json.JSONDecodeError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"{place}: not {wanted} ({error})") from None


def _decode(place: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not a text in UTF-8 ({error})") from None


def _check_row(place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        kind = "number" if isinstance(row, Decimal) else type(row).__name__
        raise ValueError(f"{place}: not a JSON object but a {kind}")
    return row


def unpacked_lines(file: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a file that may be gzipped, whatever its name, and may be a pipe, without a byte order mark.

    Raises:
        ValueError: If the file begins as a gzipped one and does not go on as one.
    """
    with open(file, "rb") as stream:
        is_gzipped = stream.peek(len(GZIP_START))[: len(GZIP_START)] == GZIP_START
        try:
            for number, line in enumerate(gzip.GzipFile(fileobj=stream) if is_gzipped else stream):
                yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{os.fspath(file)}: not a whole gzip file, it cannot be unpacked ({error})") from None
