"""`load_data` gives what a run trains on and measures."""

import json
from pathlib import Path

import pytest
import torch

import hqqtrain
from hqqtrain.common.errors import UserError


def test_texts_are_packed(text_file: Path, tokenizer):
    data = hqqtrain.load_data(text_file, tokenizer, max_seq_len=32)
    assert {len(item["input_ids"]) for item in list(data)[:-1]} == {32}
    assert data[0].keys() == {"input_ids", "labels", "position_ids"}
    loader = torch.utils.data.DataLoader(data, 4, collate_fn=hqqtrain.collate_batch)
    assert next(iter(loader))["input_ids"].shape == (4, 32)


def test_chats_are_masked(tmp_path: Path, tokenizer):
    chats = [{"messages": [{"role": "user", "content": "1 + 1?"},
                           {"role": "assistant", "content": "2"}]}] * 3  # fmt: skip
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, chats)))
    data = hqqtrain.load_data(
        file, tokenizer, packing=False, chat_template="chatml", loss_on="assistant"
    )
    assert len(data) == 3
    labels = data[0]["labels"]
    assert 0 < (labels != -100).sum() < len(labels) / 2


def test_splits_share_no_text(tmp_path: Path, tokenizer):
    file = tmp_path / "texts.jsonl"
    rows = [json.dumps({"text": f"def f_{number}(): pass"}) for number in range(200)]
    file.write_text("\n".join(rows))
    train, held_out, whole = (
        hqqtrain.load_data(file, tokenizer, packing=False, split=split, validation=0.2)
        for split in ("train", "held_out", None)
    )
    assert len(held_out) > 10
    assert len(train) + len(held_out) == len(whole) == 200


@pytest.mark.parametrize(("arguments", "message"), [
    ({"split": "test"}, "split=test: allowed are None, train, held_out"),
    ({"max_seq_len": 1}, "max_seq_len=1: must be at least 2"),
    ({"format": "csv"}, "format=csv: allowed are auto"),
    ({"source": "nowhere.txt"}, "source=nowhere.txt: no such file"),
])  # fmt: skip
def test_arguments_that_are_not_allowed(text_file: Path, tokenizer, arguments: dict, message: str):
    with pytest.raises(UserError, match=f"^load_data: {message}"):
        hqqtrain.load_data(**{"source": text_file, "tokenizer": tokenizer} | arguments)
