"""`qmodel.pt` is read in a child process, once, and nothing that it contains can do harm."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign.qmodel import converted_folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


class Call:
    """A value whose pickle calls a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_safetensors_files_are_preferred(folder):
    (folder / "qmodel.pt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(b"")
    assert converted_folder(folder, {}) is None


def test_a_pickle_that_runs_code(folder, tmp_path):
    torch.save({"a": {"b": Call(os.mkdir, str(tmp_path / "was here"))}}, folder / "qmodel.pt")
    with pytest.raises(
        UserError, match=r"qmodel\.pt: cannot be read .*contains posix.mkdir, which is code"
    ):
        converted_folder(folder, {})
    assert not (tmp_path / "was here").exists()


def test_a_bare_pickle(folder, tmp_path):
    (folder / "qmodel.pt").write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / "was here"))))
    with pytest.raises(UserError, match=r"not a complete file of torch\.save"):
        converted_folder(folder, {})
    assert not (tmp_path / "was here").exists()


def test_a_pickle_that_fills_the_memory(folder):
    torch.save({"a": {"b": Call(bytearray, 1 << 40)}}, folder / "qmodel.pt")
    with pytest.raises(UserError, match=r"qmodel\.pt: cannot be read .* more memory than its size"):
        converted_folder(folder, {})
    assert list((folder.parent / "cache" / "converted").glob("model*")) == []


def test_a_compressed_file(folder):
    with zipfile.ZipFile(folder / "qmodel.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(UserError, match="its parts are compressed"):
        converted_folder(folder, {})


def test_a_truncated_file(folder):
    torch.save({"a": {"b": torch.ones(9999)}}, folder / "qmodel.pt")
    content = (folder / "qmodel.pt").read_bytes()
    (folder / "qmodel.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"not a complete file of torch\.save"):
        converted_folder(folder, {})
