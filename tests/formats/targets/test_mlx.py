"""MLX computes scale * code + bias from what is written; read here bit by bit, as its docs say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from exports import layers, model_export, stored_tensors, write_export
from safetensors.torch import load_file

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.formats.registry import check_format


def mlx_weight(stored: dict[str, torch.Tensor], name: str, nbits: int) -> torch.Tensor:
    """Return the weight that MLX computes, from its description of affine quantization."""
    words = stored[f"{name}.weight"].numpy()
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    codes = bits.reshape(len(words), -1, nbits) @ (1 << np.arange(nbits))
    scales, biases = (stored[f"{name}.{x}"].float().numpy() for x in ("scales", "biases"))
    grouped = codes.reshape(*scales.shape, -1)
    W = grouped * scales[..., None] + biases[..., None]
    return torch.from_numpy(W.reshape(codes.shape)).float()


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group_size", [32, 64])
def test_mlx_reads_our_weights(make_wide, tmp_path, nbits, group_size):
    trained = make_wide("qwen2", nbits=nbits, group_size=group_size)
    written = write_export(trained, "mlx", tmp_path / "mlx", dtype=torch.float32)
    stored, config = stored_tensors(tmp_path / "mlx"), _config(tmp_path / "mlx")
    for name, layer in layers(trained).items():
        W = layer.dequantize(torch.float32)
        # Two roundings of fp32 at a zero near 128 differ by 1e-5 of a step.
        step = layer.scale.float().abs().max().item()
        assert (mlx_weight(stored, name, nbits) - W).abs().max() < 1e-4 * step
        assert config["quantization"][name] == {"group_size": group_size, "bits": nbits}
        if layer.bias is not None:
            assert torch.equal(stored[f"{name}.bias"], layer.bias)
    assert written.comparison.max_error < 1e-4
    assert config["quantization"] == config["quantization_config"]


@pytest.mark.parametrize(("nbits", "error"), [(8, 0.2), (4, 0.02), (2, 0.005)])
def test_fp16_rounds_a_little(make_wide, tmp_path, nbits, error):
    trained = make_wide(nbits=nbits, group_size=32)
    written = write_export(trained, "mlx", tmp_path / "mlx")
    assert 0 < written.comparison.max_error < error
    assert written.comparison.counts["rounded"] == len(written.comparison.layers)
    assert _config(tmp_path / "mlx")["dtype"] == "float16"


def test_a_large_group_becomes_several(make_wide, tmp_path):
    """MLX has no groups of 96; groups of 32 with the same scale are the same."""
    trained = make_wide(group_size=None)
    layer = layers(trained)["model.layers.0.mlp.down_proj"]
    written = write_export(trained, "mlx", tmp_path / "mlx", dtype=torch.float32)
    stored = stored_tensors(tmp_path / "mlx")
    weight = mlx_weight(stored, "model.layers.0.mlp.down_proj", 2)
    torch.testing.assert_close(weight, layer.dequantize(torch.float32))
    assert written.comparison.max_error < 1e-4


def test_the_adapter_has_one_rank_and_scale(make_wide, tmp_path):
    adapter = AdapterConfig(r=4, alpha=8)
    trained = make_wide(adapter=adapter, group_size=32)
    write_export(trained, "mlx", tmp_path / "mlx", adapter_form="separate")
    folder = tmp_path / "mlx" / "adapter"
    stored, config = load_file(folder / "adapters.safetensors"), _adapter_config(folder)
    assert config["lora_parameters"] == {
        "rank": 4, "scale": 1.0, "dropout": 0.0, "keys": config["lora_parameters"]["keys"]
    }  # fmt: skip
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
    assert config["num_layers"] == trained.hf_config.num_hidden_layers
    for module in trained.adapter.modules:
        delta = stored[f"{module}.lora_a"] @ stored[f"{module}.lora_b"]
        torch.testing.assert_close(delta.t(), trained.adapter.delta(module))


def test_smaller_ranks_are_padded(make_wide, tmp_path):
    trained = make_wide(group_size=32)
    name = trained.adapter.modules[0]
    keys = [f"base_model.model.{name}.lora_{x}.weight" for x in "AB"]
    state = dict(trained.adapter.state)
    state[keys[0]], state[keys[1]] = state[keys[0]][:2], state[keys[1]][:, :2]
    config = replace(trained.adapter.config, rank_pattern={name: 2})
    adapter = replace(trained.adapter, state=state, config=config)
    write_export(trained, "mlx", tmp_path / "mlx", adapter=adapter, adapter_form="separate")
    stored = load_file(tmp_path / "mlx" / "adapter" / "adapters.safetensors")
    assert stored[f"{name}.lora_a"].shape[1] == 4
    delta = stored[f"{name}.lora_a"] @ stored[f"{name}.lora_b"]
    torch.testing.assert_close(delta.t(), adapter.delta(name))


@pytest.mark.parametrize("quant", [{"axis": 0}, {"group_size": 16}])
def test_what_mlx_cannot_hold(make_wide, quant):
    trained = make_wide(**{"group_size": 32} | quant)
    with pytest.raises(UserError, match=r"export\.format=mlx: .* Use dense, packed, hqq"):
        check_format("mlx", trained.settings, trained.hf_config)


def test_scales_that_fp16_cannot_hold_are_refused(make_wide, tmp_path):
    trained = make_wide(group_size=32)
    layer = layers(trained)["model.layers.0.mlp.up_proj"]
    layer.scale.data[3, 1] = 1e-6
    with pytest.raises(UserError, match=r"up_proj: has a scale of .*e-0[67], which fp16 cannot"):
        write_export(trained, "mlx", tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
    write_export(trained, "mlx", tmp_path / "mlx", dtype=torch.float32)
    # A group of zeros has a tiny scale, too, and is zero whatever the scale.
    layer.scale.data[3, 1], layer.zero.data[3, 1] = 1e-30, 0
    layer.W_q.data[3] = 0
    layer.zero.data[3] = 0
    write_export(trained, "mlx", tmp_path / "mlx")
    assert model_export(trained).adapter_form == "none"


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())
