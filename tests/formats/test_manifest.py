"""A sealed folder: every changed, missing or unreadable byte is found and its file is named."""

import hashlib
import json
import os

import pytest

from hqqtrain.formats import manifest
from hqqtrain.formats.manifest import (
    MANIFEST,
    DamagedError,
    check_sealed,
    file_digest,
    is_sealed,
    seal,
)

DIGEST = {"bytes": 1, "sha256": ""}


@pytest.fixture
def folder(tmp_path):
    for name in "abcde":
        (tmp_path / name).write_bytes(name.encode() * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "inner" / "most").mkdir(parents=True)
    (tmp_path / "inner" / "f").write_text("f")
    seal(tmp_path)
    return tmp_path


def test_the_manifest_has_size_and_sha256_of_every_file(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(files) == ["a", "b", "c", "d", "e", "empty", "inner/f"]
    assert files["a"] == {"bytes": 100, "sha256": hashlib.sha256(b"a" * 100).hexdigest()}
    assert files["empty"] == {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    assert is_sealed(folder)
    check_sealed(folder)


def test_a_manifest_of_an_older_version_has_no_files_of_inner_folders(folder):
    files = json.loads((folder / MANIFEST).read_text())["files"]
    del files["inner/f"]
    (folder / MANIFEST).write_text(manifest._manifest_text(files))
    check_sealed(folder)


def test_a_folder_without_a_manifest_is_not_sealed(tmp_path):
    assert not is_sealed(tmp_path)
    with pytest.raises(DamagedError, match=MANIFEST):
        check_sealed(tmp_path)


def test_a_file_larger_than_a_block_is_hashed_completely(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_BLOCK_BYTES", 7)
    (tmp_path / "a").write_bytes(bytes(range(100)))
    digest = hashlib.sha256(bytes(range(100))).hexdigest()
    assert file_digest(tmp_path / "a") == {"bytes": 100, "sha256": digest}


def test_known_digests_are_not_computed_again(tmp_path):
    (tmp_path / "file").write_text("x")
    seal(tmp_path, known_digests={"file": {"bytes": 1, "sha256": "of the writer"}})
    with pytest.raises(DamagedError, match=r"file: .*its checksum differs"):
        check_sealed(tmp_path)


def test_every_changed_byte_is_found(folder):
    for name in ("a", "inner/f", MANIFEST):
        whole = (folder / name).read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            changed = bytearray(whole)
            changed[at] ^= 1
            (folder / name).write_bytes(changed)
            with pytest.raises(DamagedError, match=f"{name}: is not what was written"):
                check_sealed(folder)
        (folder / name).write_bytes(whole)
    check_sealed(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 99), r"a: .*\(99 bytes instead of 100\)"),
        (lambda path: os.truncate(path, 0), r"a: .*\(0 bytes instead of 100\)"),
        (lambda path: path.unlink(), r"a: cannot be read \(No such file"),
        (lambda path: (path.unlink(), path.mkdir()), r"a: "),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder / "a")
    with pytest.raises(DamagedError, match=message):
        check_sealed(folder)


def test_a_file_that_was_added_later_is_no_damage(folder):
    (folder / "later").write_text("x")
    check_sealed(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"files": []}', '{"files": {"a": 1}}', "\xff", "1e999"]
)
def test_a_damaged_manifest_is_damage(folder, text):
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedError, match=rf"{MANIFEST}: is not what was written"):
        check_sealed(folder)


def test_a_manifest_that_was_edited_is_damage(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"bytes": 100', '"bytes": 101', 1))
    with pytest.raises(DamagedError, match=MANIFEST):
        check_sealed(folder)


@pytest.mark.parametrize(
    "files",
    [{"a": 5}, {"a": {}}, [], 5, None, {"a\0": DIGEST}, {"a": {"bytes": "1", "sha256": ""}}],
)
def test_a_manifest_that_we_would_not_write_is_damage(folder, files):
    """Although its own checksum is right."""
    (folder / MANIFEST).write_text(manifest._manifest_text(files))
    with pytest.raises(DamagedError, match=rf"{MANIFEST}: is not what was written"):
        check_sealed(folder)


def test_ranks_check_every_file_exactly_once_between_them(folder, monkeypatch):
    seen: list[str] = []
    original = manifest.file_digest
    monkeypatch.setattr(
        manifest, "file_digest", lambda path: seen.append(path.name) or original(path)
    )
    for rank in range(4):
        check_sealed(folder, rank, 4)
    assert sorted(seen) == ["a", "b", "c", "d", "e", "empty", "f"]


def test_every_rank_finds_a_wrong_size(folder):
    os.truncate(folder / "e", 1)
    for rank in range(3):
        with pytest.raises(DamagedError, match="e: "):
            check_sealed(folder, rank, 3)


def test_the_manifest_of_a_copy_has_the_changed_files(folder, tmp_path):
    names = manifest._read_manifest(folder).keys()
    kept = [name for name in names if not name.startswith("sub/")] + ["unknown"]
    copy = manifest.manifest_of_copy(folder, {"a": b"new", "unknown": b""}, kept)
    (tmp_path / MANIFEST).write_bytes(copy)
    files = manifest._read_manifest(tmp_path)
    assert [*files, "unknown"] == kept
    assert files["a"] == {"bytes": 3, "sha256": hashlib.sha256(b"new").hexdigest()}
    assert files["b"] == manifest._read_manifest(folder)["b"]


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_a_listed_file_that_has_no_end_is_not_read(folder, name):
    os.mkfifo(folder / "pipe")
    files = {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}}
    (folder / MANIFEST).write_text(manifest._manifest_text(files))
    with pytest.raises(DamagedError, match=rf"{name}: is not a regular file"):
        check_sealed(folder)
