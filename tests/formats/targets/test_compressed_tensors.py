"""compressed-tensors computes (code - zero) * scale with integer zeros from what is written."""

import json

import numpy as np
import pytest
import torch
from exports import layers, stored_tensors, write_export

from hqqtrain.common.errors import UserError
from hqqtrain.formats.registry import check_format


def unpacked(words: torch.Tensor, nbits: int, n: int) -> np.ndarray:
    """Unpack int32 [rows, ...] as compressed-tensors does, without the offset of signed codes."""
    shifts = np.arange(0, 32, nbits)
    fields = (words.numpy().astype(np.int64)[..., None] >> shifts) & (2**nbits - 1)
    return fields.reshape(len(words), -1)[:, :n]


@pytest.mark.parametrize("nbits", [8, 4])
@pytest.mark.parametrize("group_size", [16, None])
def test_compressed_tensors_reads_our_weights(make_wide, tmp_path, nbits, group_size):
    trained = make_wide(nbits=nbits, group_size=group_size, zero="integer")
    written = write_export(trained, "compressed-tensors", tmp_path / "ct")
    stored = stored_tensors(tmp_path / "ct")
    for name, layer in layers(trained).items():
        rows, columns = stored[f"{name}.weight_shape"].tolist()
        assert (rows, columns) == (layer.out_features, layer.in_features)
        codes = unpacked(stored[f"{name}.weight_packed"], nbits, columns)
        scale = stored[f"{name}.weight_scale"].float().numpy()
        packed_zero = stored[f"{name}.weight_zero_point"].t().contiguous()
        zero = unpacked(packed_zero, nbits, rows).T
        grouped = codes.reshape(*scale.shape, -1)
        W = torch.from_numpy(((grouped - zero[..., None]) * scale[..., None]).reshape(rows, -1))
        ours = layer.dequantize(torch.float32)
        if nbits == 4:
            assert torch.equal(W.float(), ours)
        else:  # the fp32 scale is rounded to fp16
            torch.testing.assert_close(W.float(), ours, rtol=1e-3, atol=1e-6)
    counts = written.comparison.counts
    assert counts["exact" if nbits == 4 else "rounded"] == len(written.comparison.layers)


def test_each_setting_is_a_group_of_layers(make_wide, tmp_path):
    overrides = {"*.down_proj": {"nbits": 8}, "*.o_proj": {"group_size": None}}
    trained = make_wide(nbits=4, group_size=16, zero="integer", overrides=overrides)
    check_format("compressed-tensors", trained.settings, trained.hf_config)
    write_export(trained, "compressed-tensors", tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    groups = {
        (g["weights"]["num_bits"], g["weights"]["strategy"], g["weights"]["group_size"]): g
        for g in config["config_groups"].values()
    }
    assert groups.keys() == {(4, "group", 16), (8, "group", 16), (4, "channel", None)}
    assert "model.layers.1.mlp.down_proj" in groups[8, "group", 16]["targets"]
    assert config["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ({"zero": "float"}, "has float zeros"),
        ({"nbits": 2}, "has 2 bits"),
        ({"axis": 0}, "quant.axis=0"),
        ({"overrides": {"*.q_proj": {"nbits": 8}}}, "which vLLM and SGLang fuse"),
    ],
)
def test_what_compressed_tensors_cannot_hold(make_wide, quant, reason):
    trained = make_wide(**{"nbits": 4, "group_size": 16, "zero": "integer"} | quant)
    with pytest.raises(UserError) as error:
        check_format("compressed-tensors", trained.settings, trained.hf_config)
    assert reason in str(error.value)
