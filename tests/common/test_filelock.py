"""One process holds a lock until it closes the file or dies; others see its token."""

import hashlib
import os
import signal

import pytest

from hqqtrain.common import filelock
from hqqtrain.common.errors import UserError
from hqqtrain.common.filelock import check_shared_file, check_shared_lock, read_lock_token, try_lock


def test_a_lock_is_held_until_its_file_is_closed(tmp_path):
    path = tmp_path / "new" / "folder" / ".lock"
    first = try_lock(path)
    assert first is not None
    assert try_lock(path) is None
    first.close()
    second = try_lock(path)
    assert second is not None
    second.close()


def test_every_owner_writes_a_token_of_its_own(tmp_path):
    path = tmp_path / ".lock"
    assert read_lock_token(path) == ""
    tokens = set()
    for _ in range(3):
        with try_lock(path):
            tokens.add(read_lock_token(path))
    assert len(tokens) == 3
    assert {len(token) for token in tokens} == {16}


def test_a_refused_process_does_not_change_the_token(tmp_path):
    path = tmp_path / ".lock"
    with try_lock(path):
        token = read_lock_token(path)
        assert try_lock(path) is None
        assert read_lock_token(path) == token


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / ".lock"
    ready, written = os.pipe()
    child = os.fork()
    if child == 0:
        held = try_lock(path)
        os.write(written, b"x" if held else b"-")
        signal.pause()
    assert os.read(ready, 1) == b"x"
    assert try_lock(path) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    held = try_lock(path)
    assert held is not None
    held.close()
    os.close(ready)
    os.close(written)


def test_a_file_that_was_replaced_while_it_was_locked_is_locked_again(tmp_path, monkeypatch):
    """The last owner may remove the file between our `open` and our `flock`."""
    path = tmp_path / ".lock"
    original, calls = filelock._is_current, []

    def removed_at_first(file, where) -> bool:
        calls.append(1)
        if len(calls) == 1:
            where.unlink()
        return original(file, where)

    monkeypatch.setattr(filelock, "_is_current", removed_at_first)
    with try_lock(path) as held:
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(held.fileno()), path.stat())
        assert try_lock(path) is None


def test_a_token_that_appears_late_is_found(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    monkeypatch.setattr(filelock.time, "sleep", lambda _: path.write_text("token"))
    check_shared_lock(path, "token", "run.root=runs")


def test_a_folder_that_is_not_shared_is_an_error_with_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr(filelock, "VISIBILITY_TIMEOUT", 0.0)
    (tmp_path / ".lock").write_text("of another run")
    with pytest.raises(UserError, match=rf"^run\.root=runs: .* {tmp_path}\. All nodes need one"):
        check_shared_lock(tmp_path / ".lock", "token", "run.root=runs")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"tok"])
def test_a_damaged_token_is_not_the_token(tmp_path, monkeypatch, content):
    monkeypatch.setattr(filelock, "VISIBILITY_TIMEOUT", 0.0)
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(UserError):
        check_shared_lock(tmp_path / ".lock", "token", "run.root=runs")


def test_a_folder_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        try_lock(tmp_path / "file" / ".lock")


def test_a_planted_link_is_not_locked_and_its_target_is_kept(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        try_lock(tmp_path / ".lock")
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_lock_file_of_another_user_is_locked_without_a_new_token(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    path.write_text("token of another user")

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock, "open_for_append", refuse)
    held = try_lock(path)
    assert held is not None
    assert read_lock_token(path) == "token of another user"
    assert try_lock(path) is None
    held.close()


def test_a_file_that_all_ranks_share_has_one_content(tmp_path, monkeypatch):
    monkeypatch.setattr(filelock, "VISIBILITY_TIMEOUT", 0.0)
    (tmp_path / "a").write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    check_shared_file(tmp_path / "a", digest, "quant.cache_dir=c")
    for content in ("y", None):
        (tmp_path / "a").write_text(content) if content else (tmp_path / "a").unlink()
        with pytest.raises(UserError, match=r"^quant\.cache_dir=c: .* as rank 0 does"):
            check_shared_file(tmp_path / "a", digest, "quant.cache_dir=c")


def test_a_pipe_of_another_user_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "lock")

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(filelock, "open_for_append", refuse)
    filelock._open_lock(tmp_path / "lock").close()
