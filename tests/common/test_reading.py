"""Files that anybody may have edited are read in bounded time and memory."""

import os

import pytest

from hqqtrain.common.reading import load_json, read_bounded


def test_a_json_file_is_read(tmp_path):
    (tmp_path / "a").write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert load_json(tmp_path / "a") == {"a": [1, "ü"]}


@pytest.mark.parametrize("nested", ["[" * 10**6, '{"a":' * 10**5, "[" * 10**5 + "]" * 10**5])
def test_deep_nesting_is_an_ordinary_error(tmp_path, nested):
    (tmp_path / "a").write_text(nested)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json(tmp_path / "a")


def test_a_large_file_is_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_bounded(tmp_path / "a", 10)


@pytest.mark.parametrize("path", ["/dev/zero", "fifo", "."])
def test_other_things_than_files_are_refused_at_once(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        read_bounded(tmp_path / path, 10)
