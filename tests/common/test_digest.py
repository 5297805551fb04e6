"""Contents decide: equal names, sizes and times do not make two files the same."""

import os
import time
from pathlib import Path

import pytest

from hqqtrain.common import digest as module
from hqqtrain.common.digest import ContentDigest, content_digest, hash_blocks
from hqqtrain.common.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 1)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of every file that is read is appended."""
    names: list[str] = []
    original = module._hash_block

    def hash_block(path: Path, offset: int) -> bytes:
        names.append(path.name)
        return original(path, offset)

    monkeypatch.setattr(module, "_hash_block", hash_block)
    return names


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all files be older than the digests that are taken of them from now on."""
    now = time.time_ns
    monkeypatch.setattr(module.time, "time_ns", lambda: now() + 10_000_000_000)


def rewrite(path: Path, text: str) -> None:
    """Replace the content of `path` and keep its size, times and inode, as far as one can."""
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("settled", [False, True])
def test_a_rewrite_with_equal_size_and_time_changes_the_digest(tmp_path, monkeypatch, settled):
    if settled:
        settle(monkeypatch)
    file = tmp_path / "a"
    file.write_text("first text")
    first = content_digest(tmp_path, ["a"])
    rewrite(file, "other text")
    other = content_digest(tmp_path, ["a"])
    assert other != first
    rewrite(file, "first text")
    assert content_digest(tmp_path, ["a"]) == first


def test_a_large_file_is_read_once_while_it_does_not_change(tmp_path, monkeypatch, reads):
    settle(monkeypatch)
    (tmp_path / "a").write_text("123")
    first = content_digest(tmp_path, ["a"])
    assert content_digest(tmp_path, ["a"]) == first
    assert reads == ["a"]
    os.utime(tmp_path / "a", (1, 1))  # in doubt
    assert content_digest(tmp_path, ["a"]) == first
    assert reads == ["a", "a"]


def test_a_file_that_has_just_changed_is_read_again(tmp_path, reads):
    (tmp_path / "a").write_text("123")
    for _ in range(2):
        content_digest(tmp_path, ["a"])
    assert reads == ["a", "a"]


def test_a_digest_depends_on_names_and_contents_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("12345")
        (tmp_path / name / "b").write_text("")
    first = content_digest(tmp_path / "one", ["a", "b"])
    assert content_digest(tmp_path / "two", ["b", "a"]) == first
    assert content_digest(tmp_path / "one", ["a"]) != first
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    assert content_digest(tmp_path / "two", ["a", "c"]) != first
    assert first.startswith("sha256:")


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 8, 9])
def test_every_byte_counts_and_ranks_may_share_the_blocks(tmp_path, size):
    content = bytes(range(size))
    (tmp_path / "a").write_bytes(content)
    whole = content_digest(tmp_path, ["a"])
    shared = ContentDigest(tmp_path, ["a"])
    parts = [hash_blocks(tmp_path, shared.blocks[rank::3]) for rank in range(3)]
    assert shared.finish([parts[i % 3][i // 3] for i in range(len(shared.blocks))]) == whole
    for position in range(size):
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / "a").write_bytes(changed)
        assert content_digest(tmp_path, ["a"]) != whole


@pytest.mark.parametrize("memo", ["", "[]", "{" * 100_000, '{"a": 5}', '{"a": [[1], 2, null]}'])
def test_a_damaged_memo_costs_time_only(tmp_path, monkeypatch, reads, memo):
    settle(monkeypatch)
    (tmp_path / "a").write_text("123")
    first = content_digest(tmp_path, ["a"])
    (file,) = (tmp_path / "cache" / "digests").iterdir()
    file.write_text(memo)
    assert content_digest(tmp_path, ["a"]) == first
    assert reads == ["a", "a"]


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "a").write_text("123")
    assert content_digest(tmp_path, ["a"]).startswith("sha256:")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("missing", "cannot be read"), ("fifo", "is not a regular file")):
        with pytest.raises(UserError, match=rf"{name}: {message}"):
            content_digest(tmp_path, [name])


def test_a_memory_of_somebody_else_is_not_believed(tmp_path, monkeypatch, reads):
    settle(monkeypatch)
    (tmp_path / "a").write_text("text")
    content_digest(tmp_path, ["a"])
    reads.clear()
    content_digest(tmp_path, ["a"])
    assert reads == []
    if os.getuid() == 0:
        (memory,) = (tmp_path / "cache" / "digests").iterdir()
        os.chown(memory, 54321, -1)
    else:
        monkeypatch.setattr(module.os, "getuid", lambda: 54321)
    content_digest(tmp_path, ["a"])
    assert reads == ["a"]


def test_a_memory_behind_a_link_is_not_believed(tmp_path, monkeypatch, reads):
    settle(monkeypatch)
    (tmp_path / "a").write_text("text")
    content_digest(tmp_path, ["a"])
    (memory,) = (tmp_path / "cache" / "digests").iterdir()
    memory.rename(tmp_path / "elsewhere")
    memory.symlink_to(tmp_path / "elsewhere")
    reads.clear()
    content_digest(tmp_path, ["a"])
    assert reads == ["a"]
