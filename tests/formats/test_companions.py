"""The tokenizer is copied next to new weights; a private file that a link names is not."""

import os
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_directory
from hqqtrain.formats.companions import companion_files, companion_modes, copy_companion_files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("tokens")
    (folder / "tokenizer.json").chmod(0o640)
    (folder / "model.safetensors").write_text("weights")
    return folder


def copy(source: Path, target: Path) -> dict[str, int]:
    files = companion_files(source)
    with atomic_directory(target, companion_modes(files)) as partial:
        copy_companion_files(files, partial)
    return {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()}


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.model", "merges.txt", "chat_template.x"])
@pytest.mark.parametrize("target", ["/etc/passwd", "../secret"])
def test_a_link_out_of_the_folder_is_refused(source: Path, name: str, target: str):
    (source.parent / "secret").write_text("secret")
    (source / name).symlink_to(target)
    with pytest.raises(UserError, match=rf"{name}: is a link to .*outside"):
        companion_files(source)


def test_a_chain_of_links_is_followed_to_its_end(source: Path):
    (source.parent / "secret").write_text("secret")
    (source / "inner").symlink_to(source.parent)
    (source / "vocab.txt").symlink_to("inner/secret")
    with pytest.raises(UserError, match="outside"):
        companion_files(source)


def test_links_within_the_folder_are_copied(source: Path, tmp_path: Path):
    (source / "vocab.txt").symlink_to("tokenizer.json")
    linked = tmp_path / "link"
    linked.symlink_to(source)
    assert set(copy(linked, tmp_path / "out")) == {"tokenizer.json", "vocab.txt"}
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


def test_files_of_the_hubs_cache_are_copied(tmp_path: Path):
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1234").write_text("tokens")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1234")
    copy(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokens"


def test_a_copy_is_not_readable_for_more_users(source: Path, tmp_path: Path):
    assert copy(source, tmp_path / "first")["tokenizer.json"] & 0o007 == 0
    (source / "tokenizer.json").chmod(0o400)
    assert copy(source, tmp_path / "second")["tokenizer.json"] == 0o600


def test_what_is_no_file_is_left_out(source: Path):
    (source / "tokenizer_files").mkdir()
    os.mkfifo(source / "vocab.txt")
    (source / "merges.txt").symlink_to("missing")
    assert list(companion_files(source)) == ["tokenizer.json"]


def test_the_folder_of_several_chat_templates_is_copied(source: Path, tmp_path: Path):
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    copy(source, tmp_path / "out")
    copied = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert copied.read_text() == "{{ tools }}"
