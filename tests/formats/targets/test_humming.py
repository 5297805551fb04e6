"""humming computes (code - zero) * scale from what is written; read here bit by bit."""

import json
import re

import numpy as np
import pytest
import torch
from exports import layers, stored_tensors, write_export

from hqqtrain.common.errors import UserError
from hqqtrain.formats.registry import check_format


def humming_weight(stored: dict[str, torch.Tensor], name: str, nbits: int) -> torch.Tensor:
    words = stored[f"{name}.weight"].numpy()
    assert words.dtype == np.int32
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = bits.reshape(len(words), -1, nbits) @ (1 << np.arange(nbits))
    scale, zero = (stored[f"{name}.{x}"].float().numpy() for x in ("weight_scale", "zero_point"))
    grouped = codes.reshape(*scale.shape, -1)
    W = (grouped - zero[..., None]) * scale[..., None]
    return torch.from_numpy(W.reshape(codes.shape)).float()


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group_size", [16, 32, None])
def test_humming_reads_our_weights(make_wide, tmp_path, nbits, group_size):
    trained = make_wide(nbits=nbits, group_size=group_size)
    written = write_export(trained, "humming", tmp_path / "out")
    stored = stored_tensors(tmp_path / "out")
    dtype = torch.float16 if nbits == 8 else torch.bfloat16
    for name, layer in layers(trained).items():
        weight, W = humming_weight(stored, name, nbits), layer.dequantize(torch.float32)
        if nbits == 8:  # fp32 scale and zero are rounded to fp16
            assert (weight - W).abs().max() < 0.2 * layer.scale.abs().max()
        else:
            assert torch.equal(weight, W)
        assert stored[f"{name}.weight_scale"].dtype == dtype
    counts = written.comparison.counts
    assert counts["exact"] == (0 if nbits == 8 else len(written.comparison.layers))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dtype"] == f"uint{nbits}"
    assert config["has_zero_point"]
    assert config["is_fp_zero_point"]
    assert config["ignore"] == ["lm_head"]
    assert "dynamic" not in config or group_size is None


def test_layers_with_other_settings_are_exceptions_by_the_names_of_vllm(make_wide, tmp_path):
    overrides = {"*.down_proj": {"nbits": 4}, "*.1.self_attn.o_proj": None,
                 "*.0.self_attn.[qkv]_proj": {"group_size": 32}}  # fmt: skip
    trained = make_wide(nbits=2, group_size=16, overrides=overrides)
    check_format("humming", trained.settings, trained.hf_config)
    write_export(trained, "humming", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]

    def found(prefix: str) -> tuple[str, int]:
        """Look settings up as vLLM does."""
        for pattern, override in config["dynamic"].items():
            if pattern[0] == "+" and re.match(pattern[2:], prefix):
                return override["dtype"], override["group_size"]
        return config["dtype"], config["group_size"]

    assert found("model.layers.0.self_attn.qkv_proj") == ("uint2", 32)
    assert found("model.layers.1.self_attn.qkv_proj") == ("uint2", 16)
    assert found("model.layers.0.mlp.gate_up_proj") == ("uint2", 16)
    assert found("model.layers.1.mlp.down_proj") == ("uint4", 16)


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ({"axis": 0}, "quant.axis=0"),
        ({"group_size": 8}, "has groups of 8"),
        ({"overrides": {"*.q_proj": {"nbits": 4}}}, "which vLLM and SGLang fuse"),
        ({"overrides": {"*.up_proj": None}}, "which vLLM and SGLang fuse"),
        ({"skip": []}, "lm_head is quantized"),
    ],
)
def test_what_humming_cannot_hold(make_wide, quant, reason):
    trained = make_wide(**{"nbits": 2, "group_size": 16} | quant)
    with pytest.raises(UserError) as error:
        check_format("humming", trained.settings, trained.hf_config)
    assert reason in str(error.value)
    assert "Use dense, packed" in str(error.value)
