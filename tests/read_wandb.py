"""Reads what an offline run of W&B has written, of which the package has no reader in Python."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2


HEADER, BLOCK = 7, 2**15  # bytes
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def logged_to_wandb(folder) -> list[dict[str, float]]:
    """What each call of `log` was given, from the one run's file below a folder.

    The file is LevelDB's log: https://github.com/google/leveldb/blob/main/doc/log_format.md, behind a header.
    """
    (file,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    rows, record, place = [], b"", HEADER
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # too little of the block is left for a chunk
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        place += HEADER
        chunk = data[place : place + size]
        place += size
        record = chunk if kind in (FULL, FIRST) else record + chunk
        if kind in (FULL, LAST):
            found = wandb_internal_pb2.Record.FromString(record)
            if found.WhichOneof("record_type") == "history":
                items = found.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        else:
            assert kind in (FIRST, MIDDLE), f"{file} is not whole"
    return rows
