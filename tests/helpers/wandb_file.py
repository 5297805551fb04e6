"""Read the records of .wandb files, as `wandb sync` would send them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def wandb_files(run_dir: Path) -> list[Path]:
    """List the .wandb files under `run_dir`, oldest first."""
    return sorted(run_dir.glob("wandb/*run-*/*.wandb"))


def read_run_records(run_dir: Path) -> list[Record]:
    """Read every record of the only .wandb file under `run_dir`."""
    (file,) = wandb_files(run_dir)
    return read_records(file)


def read_records(file: Path) -> list[Record]:
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
        _, length, chunk_type = struct.unpack("<IHB", content[offset : offset + 7])
        if chunk_type == 0 or offset + 7 + length > len(content):
            return  # the incomplete last chunk of a killed writer
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if chunk_type in (1, 4):
            yield record
            record = b""


def history_rows(records: list[Record]) -> list[dict]:
    """Return the logged rows; a value that is a dict (a table, an image) becomes its `_type`."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = [(item.nested_key or [item.key], item) for item in record.history.item]
            plain = {key[0]: json.loads(item.value_json) for key, item in items if len(key) == 1}
            types = {k[0]: json.loads(i.value_json) for k, i in items if k[1:] == ["_type"]}
            rows.append(plain | types)
    return rows


def merged_updates(records: list[Record], field: str) -> dict:
    """Return the last state of `field`, "config" or "summary"; dots join nested keys."""
    merged = {}
    for record in records:
        record_type = record.WhichOneof("record_type")
        if record_type == "run":  # the first record has a config and a summary, too
            updates = getattr(record.run, field).update
        else:
            updates = getattr(record, field).update if record_type == field else []
        for item in updates:
            key = item.key or ".".join(item.nested_key)
            merged[key] = json.loads(item.value_json)
    return merged
