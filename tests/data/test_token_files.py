"""Tokens in files are those in memory, and a file that was torn or altered is noticed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from chat_examples import CHAT, COMPLETION, TOKENS
from transformers import AutoTokenizer

from hqqtrain.config.groups import DataConfig
from hqqtrain.data import sequences as module
from hqqtrain.data.packing import EXAMPLES, PACKED, TokenizedData, pack_examples
from hqqtrain.data.token_files import (
    INDEX,
    DamagedStoreError,
    TokenWriter,
    describe_store,
    map_sequences,
    save_sequences,
)
from hqqtrain.models.source import TINY_FOLDER

ARRAYS = ("stream", "targets", "starts", "begin", "end")
TEXTS = ["def f(x):\n    return x\n" * n for n in (1, 5, 2, 9, 3)]


def _pack(examples: list, packing: bool, **options) -> TokenizedData:
    return pack_examples(
        examples, AutoTokenizer.from_pretrained(TINY_FOLDER), max_seq_len=29, packing=packing,
        data=DataConfig(chat_template="chatml"), **options,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("examples", [TEXTS, [CHAT, COMPLETION, TOKENS] * 5])
def test_the_same_sequences_as_in_memory(tmp_path, monkeypatch, examples, packing, chunk):
    in_memory = _pack(examples, packing).sequences
    digest = in_memory.digest
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
    parts, written, _ = _pack(examples, packing, folder=tmp_path)
    shares = written.stream is not parts.stream
    assert shares == (packing and examples is not TEXTS)
    save_sequences(tmp_path, {EXAMPLES: parts, **({PACKED: written} if shares else {})})
    mapped = map_sequences(tmp_path, PACKED if shares else EXAMPLES)
    for name in ARRAYS:
        ours, expected = getattr(mapped, name), getattr(in_memory, name)
        assert ours.dtype == expected.dtype
        assert ours.tolist() == expected.tolist()
    assert mapped.digest == written.digest == digest
    assert mapped.is_plain_text == in_memory.is_plain_text
    assert mapped.target_token_count == in_memory.target_token_count
    assert not mapped.stream.flags.writeable
    assert isinstance(mapped.stream.base, np.memmap)


def _save(folder: Path) -> None:
    writer = TokenWriter(folder, EXAMPLES)
    writer.append(np.arange(9, dtype=np.int32), np.arange(9) > 3)
    writer.append(np.arange(4, dtype=np.int32), np.arange(4) > 0)
    save_sequences(folder, {EXAMPLES: writer.finish()}, made_from={"data.source": "a.jsonl"})


def test_a_description_says_what_the_tokens_are(tmp_path: Path):
    _save(tmp_path)
    content = describe_store(tmp_path)
    assert content["made_from"] == {"data.source": "a.jsonl"}
    counts = {"tokens": 13, "texts": 2, "sequences": 2}
    assert content["sequences"][EXAMPLES].items() >= counts.items()


@pytest.mark.parametrize("suffix", ["tokens", "targets", "bounds"])
@pytest.mark.parametrize("fault", ["altered", "torn", "longer", "missing", "linked"])
def test_a_damaged_file_is_noticed(tmp_path: Path, suffix: str, fault: str):
    _save(tmp_path)
    file = tmp_path / f"{EXAMPLES}.{suffix}"
    content = file.read_bytes()
    assert map_sequences(tmp_path, EXAMPLES).stream.tolist() == [*range(9), *range(4)]
    file.unlink()
    if fault == "linked":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif fault == "altered":  # one bit
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif fault != "missing":
        file.write_bytes(content[:-1] if fault == "torn" else content + b"\0")
    with pytest.raises(DamagedStoreError, match=str(tmp_path)):
        map_sequences(tmp_path, EXAMPLES)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"sequences": []}', '{"sequences": {}}', "[" * 9999]
)
def test_an_index_that_is_not_ours(tmp_path: Path, content: str):
    _save(tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(DamagedStoreError):
        map_sequences(tmp_path, EXAMPLES)


@pytest.mark.parametrize("positions", [[-1, 9], [0, 14], [2**62, 9]])
def test_bounds_outside_of_the_tokens_are_refused_before_they_are_used(tmp_path, positions):
    _save(tmp_path)
    bounds = np.fromfile(tmp_path / f"{EXAMPLES}.bounds", np.int64)
    bounds[:2] = positions
    bounds.tofile(tmp_path / f"{EXAMPLES}.bounds")
    with pytest.raises(DamagedStoreError, match="other content"):
        map_sequences(tmp_path, EXAMPLES)


def test_a_negative_count_is_damage(tmp_path: Path):
    _save(tmp_path)
    content = json.loads((tmp_path / INDEX).read_text())
    content["sequences"][EXAMPLES]["texts"] = -2
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(DamagedStoreError):
        map_sequences(tmp_path, EXAMPLES)


def test_no_texts(tmp_path: Path):
    save_sequences(tmp_path, {EXAMPLES: TokenWriter(tmp_path, EXAMPLES).finish()})
    assert len(map_sequences(tmp_path, EXAMPLES)) == 0
    assert os.path.getsize(tmp_path / f"{EXAMPLES}.tokens") == 0
