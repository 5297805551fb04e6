"""Entries of a cache: complete or absent, never a link, written by one process at a time."""

import os
from pathlib import Path

import pytest

from hqqtrain.common.cache_entry import (
    default_cache_root,
    is_complete_entry,
    lock_entry,
    lock_path,
)
from hqqtrain.common.errors import UserError


def test_an_entry_is_complete_with_its_marker(tmp_path: Path):
    entry = tmp_path / "entry"
    assert not is_complete_entry(entry, "index.json", "x.cache_dir")
    entry.mkdir()
    assert not is_complete_entry(entry, "index.json", "x.cache_dir")
    (entry / "index.json").touch()
    assert is_complete_entry(entry, "index.json", "x.cache_dir")


def test_a_link_is_no_entry(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "index.json").touch()
    (tmp_path / "entry").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        is_complete_entry(tmp_path / "entry", "index.json", "x.cache_dir")


def test_where_everybody_may_write_an_entry_of_another_user_is_refused(tmp_path: Path, monkeypatch):
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "index.json").touch()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert is_complete_entry(entry, "index.json", "x.cache_dir")  # only the owner may write
    tmp_path.chmod(0o777)
    assert is_complete_entry(entry, "index.json", "x.cache_dir")  # it is the owner's of the cache
    stat = Path.stat

    def of_third_user(path: Path, **options: bool) -> os.stat_result:
        found = list(stat(path, **options))
        found[4] = uid + 2 if path == entry else found[4]
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", of_third_user)
    with pytest.raises(UserError, match=rf"x\.cache_dir=.*uid {uid + 2}"):
        is_complete_entry(entry, "index.json", "x.cache_dir")


def test_one_process_locks_an_entry(tmp_path: Path):
    path = lock_path(tmp_path / "cache" / "entry")
    first = lock_entry(path, "x.cache_dir=c")
    assert first is not None
    assert lock_entry(path, "x.cache_dir=c") is None
    first.close()
    again = lock_entry(path, "x.cache_dir=c")
    assert again is not None
    again.close()


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"x\.cache_dir=c: cannot be written to"):
        lock_entry(lock_path(tmp_path / "file" / "entry"), "x.cache_dir=c")


def test_a_cache_is_beside_the_runs_if_the_user_has_none(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "user"))
    assert default_cache_root("tokens", tmp_path / "runs") == tmp_path / "user" / "tokens"
    (tmp_path / "file").touch()
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "file"))
    assert default_cache_root("tokens", tmp_path / "runs") == tmp_path / "runs" / "tokens"
