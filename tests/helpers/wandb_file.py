"""Reads what wandb has written: the records of .wandb files, as `wandb sync` would send them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def wandb_files(run_dir: Path) -> list[Path]:
    """The .wandb files under `run_dir`, oldest first."""
    return sorted(run_dir.glob("wandb/*run-*/*.wandb"))


def records(run_dir: Path) -> list[Record]:
    """Every record of the one .wandb file under `run_dir`."""
    (file,) = wandb_files(run_dir)
    return records_of(file)


def records_of(file: Path) -> list[Record]:
    """Every record of a .wandb file."""
    return [Record.FromString(data) for data in leveldb_log(file.read_bytes())]


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The format of .wandb: LevelDB's log, blocks of 32 KiB, after a header of 7 bytes.

    A chunk has a CRC (4), a length (2) and a type (1: whole, 2: first, 3: middle, 4: last).
    """
    assert content[:4] == b":W&B"
    at, pieces = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0 or at + 7 + length > len(content):
            return  # a killed writer's last chunk
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


def history(found: list[Record]) -> list[dict]:
    """The logged rows; what has a dict for a value (a table, an image) gives its `_type`."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = [(item.nested_key or [item.key], item) for item in record.history.item]
            plain = {key[0]: json.loads(item.value_json) for key, item in items if len(key) == 1}
            kinds = {k[0]: json.loads(i.value_json) for k, i in items if k[1:] == ["_type"]}
            rows.append(plain | kinds)
    return rows


def updates(found: list[Record], kind: str) -> dict:
    """The config or the summary as it was last written, nested keys joined by dots."""
    merged = {}
    for record in found:
        name = record.WhichOneof("record_type")
        part = getattr(record, kind) if name == kind else None
        if name == "run":
            part = getattr(record.run, kind)
        for item in part.update if part is not None else []:
            key = item.key or ".".join(item.nested_key)
            merged[key] = json.loads(item.value_json)
    return merged
