"""Replies are counted and written to a new file."""

import json
import os
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.generation.generator import Generation
from hqqtrain.tasks.replies import Replies


def test_the_speed_of_both_phases():
    replies = Replies()
    assert replies.describe_speed() == ""
    for _ in range(2):
        replies.count_tokens(Generation("x", [1] * 11, 50, True, 0.5, 2.0))
    assert replies.describe_speed() == (
        "prefill: 100 prompt tokens in 1.00 s, 100.0 tokens/s; "
        "decode: 20 tokens in 4.00 s, 5.0 tokens/s"
    )
    single = Replies()
    single.count_tokens(Generation("x", [1], 50, True, 0.5, 0.0))
    assert single.describe_speed() == "prefill: 50 prompt tokens in 0.50 s, 100.0 tokens/s"


def test_rows_are_written_as_json_lines(tmp_path: Path):
    file = tmp_path / "out.jsonl"
    replies = Replies(str(file))
    replies.write()
    assert not file.exists()
    rows = [{"prompt": "a\nb", "completion": "\N{SNOWMAN}\udcff"}, {"messages": []}]
    for row in rows:
        replies.keep(row)
    replies.write()
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert os.listdir(tmp_path) == ["out.jsonl"]
    Replies().write()


def test_a_file_that_exists_or_cannot_be_made_is_refused_at_once(tmp_path: Path):
    (tmp_path / "there").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name in ("there", "link"):
        with pytest.raises(UserError, match=rf"generate\.output=.*{name}: exists already"):
            Replies(str(tmp_path / name))
    with pytest.raises(UserError, match="is not a folder to write to"):
        Replies(str(tmp_path / "no" / "x"))


def test_a_folder_that_takes_no_file_is_one_message(tmp_path: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hqqtrain.tasks.replies.atomic_write", fail)
    replies = Replies(str(tmp_path / "out.jsonl"))
    replies.keep({"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match=r"out\.jsonl: cannot be written \(No space left"):
        replies.write()
