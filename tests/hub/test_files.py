"""Pushed files have no path or secret of this machine, and nothing that is no part of a model."""

import json
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.formats.manifest import check_sealed, seal
from hqqtrain.formats.signed_card import signed_card
from hqqtrain.hub.files import check_private, private_paths, result_files


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
    _write(folder, {
        "config.json": "{}", "errors.json": "[]", "adapter/adapter_config.json": "{}",
        "adapter_config.json": '{"model": "/data/alice/x"}',
    })  # fmt: skip
    seal(folder)
    for name, file in result_files(folder, "alice/model").items():
        content = file.read_bytes() if isinstance(file, Path) else file
        _write(copy, {name: content.decode()})
    check_sealed(copy)
    assert (copy / "errors.json").is_file()
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
    check_private({"tokenizer_config.json": file}, [])
    with pytest.raises(UserError, match=r"tokenizer_config.json: contains /data/mine/models, a pa"):
        check_private({"tokenizer_config.json": file}, ["/data/mine/models/"])
    with pytest.raises(UserError, match=r"^README.md: contains /data/alice.* or delete the file"):
        check_private({"README.md": b"see /data/alice/x"}, [])


def test_a_secret_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "Zürich-0123")
    monkeypatch.setenv("HF_TOKEN", "some-token")
    _write(tmp_path, {"config.json": json.dumps({"a": "x Zürich-0123"})})
    with pytest.raises(UserError, match=r"config\.json: contains the value of MY_API_KEY, so"):
        check_private({"config.json": tmp_path / "config.json"}, [])
    with pytest.raises(UserError, match=r"^x: contains the .* not pushed\. Remove it") as caught:
        check_private({"x": b"some-token"}, [])
    assert "some-token" not in str(caught.value)


def test_what_is_no_part_of_a_model_is_left_out(tmp_path, caplog):
    parts = (
        "adapter/adapter_model.safetensors adapter/adapters.safetensors x-Q4_1.gguf vocab.json "
        "model-00001-of-00002.safetensors model.safetensors.index.json generation_config.json "
        "tokenizer.json tokenizer.model merges.txt special_tokens_map.json chat_template.jinja "
        "LICENSE.txt USE_POLICY.md Modelfile"
    )
    others = (
        "checkpoint-5/model.safetensors checkpoint-5/optimizer.pt training_args.bin notes.md "
        "credentials.json runs/events.out.host tokenizer/id_rsa"
    )
    _write(tmp_path, dict.fromkeys(f"{parts} {others}".split(), "x"))
    assert set(result_files(tmp_path, "alice/model")) == set(parts.split())
    assert "checkpoint-5/model.safetensors is not pushed" in caplog.text
    assert "nor are 6 more files" in caplog.text


def test_short_paths_are_words_of_tokenizers(monkeypatch):
    monkeypatch.setenv("HOME", "/solo")
    paths = private_paths(["/data", "~/runs", "/data/alice/x"])
    assert {"/solo/runs", "/data/alice/x"} <= set(paths)
    assert not {"/solo", "/data"} & set(paths)
