"""Pushed files have no path of this machine, and nothing that the user did not mean to push."""

import json
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.formats.manifest import check_sealed, seal
from hqqtrain.formats.signed_card import signed_card
from hqqtrain.hub.files import check_paths, private_paths, result_files


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_adapters_name_the_repository_as_their_base(tmp_path):
    peft = {"base_model_name_or_path": "/data/alice/runs/x/quantized", "revision": "v1", "r": 8}
    _write(tmp_path, {
        "adapter_config.json": json.dumps(peft),
        "adapter/adapter_config.json": json.dumps({"model": "/data/alice/x", "num_layers": 2}),
        "model.safetensors": "weights", ".cache/x": "", ".hidden": "",
    })  # fmt: skip
    files = result_files(tmp_path, "alice/model")
    assert sorted(files) == ["adapter/adapter_config.json", "adapter_config.json",
                             "model.safetensors"]  # fmt: skip
    expected = {"base_model_name_or_path": "alice/model", "revision": None, "r": 8}
    assert json.loads(files["adapter_config.json"]) == expected
    mlx = json.loads(files["adapter/adapter_config.json"])
    assert mlx == {"model": "alice/model", "num_layers": 2}
    assert files["model.safetensors"] == tmp_path / "model.safetensors"


def test_only_a_card_that_hqqtrain_wrote_is_left_out(tmp_path):
    _write(tmp_path, {"README.md": signed_card("A card.\n"), "model.safetensors": "weights"})
    assert list(result_files(tmp_path, "alice/model")) == ["model.safetensors"]
    _write(tmp_path, {"README.md": "My card."})
    assert result_files(tmp_path, "alice/model")["README.md"] == tmp_path / "README.md"


def test_the_manifest_is_that_of_the_pushed_files(tmp_path):
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    _write(folder, {"config.json": "{}", "adapter_config.json": '{"model": "/data/alice/x"}',
                    "adapter/adapter_config.json": "{}"})  # fmt: skip
    seal(folder)
    for name, file in result_files(folder, "alice/model").items():
        content = file.read_bytes() if isinstance(file, Path) else file
        _write(copy, {name: content.decode()})
    check_sealed(copy)
    (copy / "adapter" / "adapter_config.json").unlink()  # which loaders of models do not download
    check_sealed(copy)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json: is not what was written\.$"):
        result_files(folder, "alice/model")


def test_a_link_is_refused(tmp_path):
    (tmp_path / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"vocab\.txt: is not a regular file; replace it"):
        result_files(tmp_path, "alice/model")


def test_a_path_of_this_machine_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/data/alice")
    _write(tmp_path, {"tokenizer_config.json": '{"name_or_path": "/data/mine/models/x"}'})
    file = tmp_path / "tokenizer_config.json"
    check_paths({"tokenizer_config.json": file}, [])
    with pytest.raises(UserError, match=r"tokenizer_config.json: contains /data/mine/models, a pa"):
        check_paths({"tokenizer_config.json": file}, ["/data/mine/models/"])
    with pytest.raises(UserError, match=r"^README.md: contains /data/alice.* or delete the file"):
        check_paths({"README.md": b"see /data/alice/x"}, [])


def test_short_paths_are_words_of_tokenizers(monkeypatch):
    monkeypatch.setenv("HOME", "/solo")
    paths = private_paths(["/data", "~/runs", "/data/alice/x"])
    assert {"/solo/runs", "/data/alice/x"} <= set(paths)
    assert not {"/solo", "/data"} & set(paths)
