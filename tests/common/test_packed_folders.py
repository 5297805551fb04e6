"""Which program has quantized a model is known from names alone."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from hqqtrain.common.packed_folders import is_quantized, quantized_by


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "GPTQ"}}, "gptq"),
        ({"quantization_config": {"quant_method": "hqqtrain"}}, "hqqtrain"),
        ({"quantization_config": {"bits": 4}, "quantization": {"bits": 4}}, "mlx"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": {}}, None),
        ({"quantization_config": 5}, None),
        ({}, None),
    ],
)
def test_config_json_names_the_method(tmp_path, config, method):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantized_by(tmp_path) == method


def test_hqq_writes_no_method_into_config_json(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.W_q": np.ones(2)}, tmp_path / "model.safetensors")
    assert quantized_by(tmp_path) == "hqq"
    assert is_quantized(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a.W_q": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert quantized_by(tmp_path) == "hqq"


def test_a_pickle_of_hqq(tmp_path):
    (tmp_path / "qmodel.pt").write_bytes(b"")
    assert quantized_by(tmp_path) == "hqq"
    save_file({"a.weight": np.ones(2)}, tmp_path / "model.safetensors")
    assert quantized_by(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 64, b"\2" + b"\0" * 7 + b"[]"])
def test_a_damaged_file_looks_dense(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert quantized_by(tmp_path) is None
    assert not is_quantized(tmp_path)


def test_a_damaged_index_looks_dense(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[1]")
    assert quantized_by(tmp_path) is None
