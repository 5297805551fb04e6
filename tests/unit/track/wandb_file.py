"""Reads the records of .wandb files, as `wandb sync` would send them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def wandb_files(run_dir: Path) -> list[Path]:
    """List the .wandb files under `run_dir`, oldest first."""
    return sorted(run_dir.glob("wandb/*run-*/*.wandb"))


def records(run_dir: Path) -> list[Record]:
    """Read every record of the only .wandb file under `run_dir`."""
    (file,) = wandb_files(run_dir)
    return records_of(file)


def records_of(file: Path) -> list[Record]:
    """Read every record of a .wandb file."""
    return [Record.FromString(data) for data in leveldb_log(file.read_bytes())]


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    The log has blocks of 32 KiB. A record is split into chunks, and the header of a chunk has a CRC
    (4 bytes), a length (2 bytes) and a type (1 byte; 1: whole record, 2: first, 3: middle, 4: last
    chunk).
    """
    assert content[:4] == b":W&B"
    offset, record = 7, b""
    while offset + 7 <= len(content):
        if 32768 - offset % 32768 < 7:  # no chunk header fits: the block ends in padding
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        if kind == 0 or offset + 7 + length > len(content):
            return  # the incomplete last chunk of a killed writer
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def history(found: list[Record]) -> list[dict]:
    """Return the logged rows; a value that is a dict (a table, an image) becomes its `_type`."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = [(item.nested_key or [item.key], item) for item in record.history.item]
            plain = {key[0]: json.loads(item.value_json) for key, item in items if len(key) == 1}
            kinds = {k[0]: json.loads(i.value_json) for k, i in items if k[1:] == ["_type"]}
            rows.append(plain | kinds)
    return rows


def updates(found: list[Record], kind: str) -> dict:
    """Return the last state of the config or the summary, with nested keys joined by dots."""
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
