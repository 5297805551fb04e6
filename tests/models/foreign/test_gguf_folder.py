"""The folder that stands for a GGUF file, and files of which none can be made."""

import json
import sys

import numpy as np
import pytest
from gguf_models import write_gguf

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign import gguf_folder, gguf_rope
from hqqtrain.models.foreign.gguf_folder import INDEX, prepared_folder, the_gguf_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "m.gguf", {"attn_q": "Q4_0"})


def test_it_is_made_once(file, monkeypatch):
    folder = prepared_folder(file)
    index = json.loads((folder / INDEX).read_text())["tensors"]
    entry = index["model.layers.0.self_attn.q_proj.weight"]
    assert (entry["shape"], entry["type"], entry["heads"]) == ([256, 256], "Q4_0", 2)
    assert index["model.layers.0.self_attn.k_proj.weight"]["heads"] == 1
    assert index["model.norm.weight"]["type"] == "F32"
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gguf"}
    assert config["model_type"] == "llama"
    monkeypatch.setattr(gguf_folder, "_write", None)
    assert prepared_folder(file) == folder


def test_the_positions_of_llama_3_are_scaled(tmp_path):
    half = 64
    plain = 10000.0 ** -(np.arange(half) / half)
    factors = np.array([gguf_rope._factor(1 / f, 8.0) for f in plain], np.float32)
    file = write_gguf(tmp_path / "m.gguf", {}, more={"rope_freqs.weight": factors})
    folder = prepared_folder(file)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 10000.0)
    assert "rope_freqs.weight" not in json.loads((folder / INDEX).read_text())["tensors"]


def test_config_json_next_to_the_file_comes_first(file):
    config = {"model_type": "llama", "num_attention_heads": 2, "rope_theta": 7.0}
    (file.parent / "config.json").write_text(json.dumps(config))
    written = json.loads((prepared_folder(file) / "config.json").read_text())
    assert written.items() >= config.items()


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"num_attention_heads": "x"}'])
def test_a_damaged_config_json_next_to_the_file(file, text):
    (file.parent / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"not a JSON object|attention heads"):
        prepared_folder(file)


def test_a_folder_with_several_files(file):
    file.with_name("adapter.gguf").write_bytes(b"")  # of an export
    assert the_gguf_file(file) == the_gguf_file(file.parent) == file
    file.with_name("n.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 2 GGUF files; name one of them, such as .*m\.gguf"):
        the_gguf_file(file.parent)


@pytest.mark.parametrize("size", [0, 3, 30, 500])
def test_a_damaged_file(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"not a complete GGUF file"):
        prepared_folder(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "bert"}, r"has the architecture bert\. Those .* are llama, qwen2"),
        ({"fields": {"split.count": 2}}, r"is one of several parts; merge them"),
        ({"more": {"rope_freqs.weight": np.arange(64, dtype=np.float32)}}, r"scales its positions"),
        ({"texts": {"llama.rope.scaling.type": "yarn"}}, r"scales its positions"),
    ],
)
def test_files_that_cannot_be_taken_over(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepared_folder(write_gguf(tmp_path / "m.gguf", {"attn_q": "Q4_0"}, **options))


def test_a_tokenizer_that_transformers_cannot_read(file):
    (file.parent / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"cannot read its tokenizer .*Put config\.json"):
        prepared_folder(file)


def test_without_the_package(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'hqqtrain\[gguf\]'"):
        prepared_folder(file)
