"""Folders and files are complete or absent, even if the process is killed."""

import json
import os
import signal
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import (
    atomic_directory,
    atomic_write,
    atomic_write_json,
    check_owner,
    open_for_append,
    remove,
    stat_digest,
    without_nonfinite,
)


def test_a_folder_appears_complete(tmp_path):
    target = tmp_path / "deep" / "ünïcode"
    with atomic_directory(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "x"
    assert os.listdir(target.parent) == [target.name]


def test_files_follow_the_umask_which_is_never_changed(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch, atomic_directory(tmp_path / "out") as partial:
            (partial / "inner").mkdir()
            for name in ("file", "inner/private"):
                (partial / name).write_text("x")
                (partial / name).chmod(0o600)
            patch.delattr(os, "umask")  # changing it would affect the files of other threads
    finally:
        os.umask(before)
    for name in ("file", "inner/private"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o640


def test_a_failure_removes_the_new_folder(tmp_path):
    def fail():
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_old_folder(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "old").read_text() == "old"


def test_a_folder_is_replaced_not_mixed(tmp_path):
    for name in ("one", "two"):
        with atomic_directory(tmp_path / "out") as partial:
            (partial / name).write_text(name)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["two"]


def test_a_killed_process_leaves_no_target(tmp_path):
    target = tmp_path / "out"
    if (child := os.fork()) == 0:
        with atomic_directory(target) as partial:
            (partial / "file").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not target.exists()
    with atomic_directory(target) as partial:
        assert os.listdir(partial) == []
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupted_swap_is_undone(tmp_path):
    """A process was killed between the two renames: only the renamed old folder exists."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "old").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_json_round_trips(tmp_path):
    path = tmp_path / "状態.json"
    atomic_write_json(path, {"name": "ü", "value": 0.1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ü", "value": 0.1}
    assert os.listdir(tmp_path) == [path.name]


def test_a_name_that_is_not_utf_8_is_written(tmp_path):
    """As that of a file of texts, which summary.json has."""
    name = os.fsdecode(b"bad\xff.jsonl")
    atomic_write_json(tmp_path / "a.json", {name: [name, "ü", r"\udcff"]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {name: [name, "ü", r"\udcff"]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_json_lacks_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


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


def test_nonfinite_numbers_become_null_at_any_depth():
    nan, inf = float("nan"), float("inf")
    value = {"a": nan, "b": [1.5, -inf, {"c": inf}], "d": (nan,), "e": "nan", "f": None, "g": True}
    assert without_nonfinite(value) == {
        "a": None, "b": [1.5, None, {"c": None}], "d": [None], "e": "nan", "f": None, "g": True,
    }  # fmt: skip


def test_a_digest_changes_with_names_sizes_and_times(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_text("22")
    seen = [stat_digest(tmp_path)]
    assert stat_digest(tmp_path) == seen[0]
    os.utime(tmp_path / "a", (1, 1))
    seen.append(stat_digest(tmp_path))
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    seen.append(stat_digest(tmp_path))
    (tmp_path / "sub" / "c").write_text("333")
    seen.append(stat_digest(tmp_path))
    (tmp_path / "sub" / "c").unlink()
    seen += [stat_digest(tmp_path), stat_digest(tmp_path / "a")]
    assert len(set(seen)) == len(seen)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a folder with a file that nobody may change."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    return tmp_path / "victim"


def _is_untouched(victim: Path) -> bool:
    (file,) = victim.iterdir()
    return file.name == "file" and file.read_text() == "mine"


@pytest.mark.parametrize("name", ["out", ".out.partial"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_planted_link_is_replaced_and_not_followed(name, link, victim, tmp_path):
    link(victim / "file", tmp_path / name)
    atomic_write(tmp_path / "out", "ours")
    assert (tmp_path / "out").read_text() == "ours"
    assert not (tmp_path / "out").is_symlink()
    assert _is_untouched(victim)
    assert sorted(os.listdir(tmp_path)) == ["out", "victim"]


@pytest.mark.parametrize("name", ["out", ".out.partial", ".out.old"])
@pytest.mark.parametrize("target", ["victim", "missing", "victim/file"])
def test_a_planted_link_to_a_folder_is_replaced_and_not_followed(name, target, victim, tmp_path):
    (tmp_path / name).symlink_to(tmp_path / target)
    for _ in range(2):
        with atomic_directory(tmp_path / "out") as partial:
            (partial / "a").write_text("ours")
    assert os.listdir(tmp_path / "out") == ["a"]
    assert not (tmp_path / "out").is_symlink()
    assert _is_untouched(victim)
    assert sorted(os.listdir(tmp_path)) == ["out", "victim"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_appended_through_a_link(link, victim, tmp_path):
    link(victim / "file", tmp_path / "log")
    with pytest.raises(OSError, match=r"link|symbolic"):
        open_for_append(tmp_path / "log")
    assert _is_untouched(victim)


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="no regular file"):
        open_for_append(tmp_path / "log")


def test_remove_never_follows_a_link(victim, tmp_path):
    (tmp_path / "link").symlink_to(victim)
    remove(tmp_path / "link")
    remove(tmp_path / "missing")
    assert _is_untouched(victim)
    remove(victim)
    assert os.listdir(tmp_path) == []


def test_a_copy_gets_no_wider_permissions_than_its_original(tmp_path):
    with atomic_directory(tmp_path / "out", {"copy": 0o600}) as partial:
        for name in ("copy", "own"):
            (partial / name).write_text("x")
    assert (tmp_path / "out" / "copy").stat().st_mode & 0o077 == 0
    assert (tmp_path / "out" / "own").stat().st_mode & 0o044 == 0o044 & ~_umask(tmp_path)


def _umask(tmp_path: Path) -> int:
    (tmp_path / "probe").mkdir()
    return ~(tmp_path / "probe").stat().st_mode


@pytest.mark.parametrize(
    ("owner", "mode", "is_refused"),
    [(12345, 0o777, True), (12345, 0o775, False), (0, 0o1777, False), (None, 0o777, False)],
)
def test_a_folder_that_a_stranger_has_prepared_is_refused(tmp_path, monkeypatch, owner, mode,
                                                          is_refused):  # fmt: skip
    tmp_path.chmod(mode)
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own if owner is None else owner + 1)
    real = Path.stat
    values = list(real(tmp_path))
    values[4] = own if owner is None else owner
    monkeypatch.setattr(Path, "stat", lambda *_, **__: os.stat_result(values))
    if is_refused:
        with pytest.raises(UserError, match=r"run\.name=x: .* belongs to another user"):
            check_owner(tmp_path, "run.name=x")
    else:
        check_owner(tmp_path, "run.name=x")
    monkeypatch.undo()
    check_owner(tmp_path / "missing", "run.name=x")
