"""A folder is made of files once, whoever asks for it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign.converted import converted


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))


def test_it_is_made_once_by_one_of_several(tmp_path):
    (tmp_path / "a").write_text("1")
    made = []

    def make(folder, digest):
        made.append(digest)
        (folder / "config.json").write_text("{}")

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: converted("x", tmp_path, ["a"], make), range(8)))
    assert len(made) == len(set(folders)) == 1
    (tmp_path / "a").write_text("2")
    assert converted("x", tmp_path, ["a"], make) != folders[0]
    assert converted("\U0001f600" * 60, tmp_path, ["a"], make).is_dir()


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("1")

    def fail(folder, digest):
        (folder / "config.json").write_text("{}")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        converted("x", tmp_path, ["a"], fail)
    assert list((tmp_path / "cache" / "converted").glob("x*")) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("1")
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "a"))
    with pytest.raises(UserError, match="HQQTRAIN_CACHE="):
        converted("x", tmp_path, ["a"], lambda *_: None)
