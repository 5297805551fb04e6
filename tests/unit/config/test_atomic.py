"""Atomic writes leave either the old file or the new one, even when writing fails."""

import os
from pathlib import Path

import pytest

from hqqtrain.config.atomic import atomic_write


@pytest.mark.parametrize("content", ["", "naïve\nlines\r\n", b"\x00\xff"])
def test_writes_text_and_bytes_as_they_are(content, tmp_path):
    file = atomic_write(tmp_path / "file", content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(fails, tmp_path, monkeypatch):
    file = atomic_write(tmp_path / "file", "old")

    def disk_full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), disk_full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    assert atomic_write(file, "new").read_text() == "new"
