"""Checkpoints of GPTQ's tools, packed by plain Python."""

import json

import pytest
import torch
from foreign_models import dequantized, load_foreign, open_folder
from packers import gptq_tensors, random_weight, save_layers
from safetensors.torch import load_file, save_file
from torch import nn

from hqqtrain.common.errors import UserError

V1 = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
def test_weights_are_equal_to_the_bit(tmp_path, nbits, version):
    weight = random_weight(nbits)  # with zeros of 0, which borrow a bit in version 1
    config = {"quant_method": "gptq", "checkpoint_format": ("gptq", "gptq_v2")[version - 1]}
    layers = {"m": gptq_tensors(weight, nbits, version=version)}
    reader = open_folder(save_layers(tmp_path, layers, config))
    assert torch.equal(dequantized(reader, "m", torch.float16), weight.dequantized)
    spec = reader.layers["m"].spec
    assert (spec.nbits, spec.group_size, spec.axis, spec.zero) == (nbits, 32, 1, "integer")
    assert spec.meta_dtype == torch.float16


def test_bits_and_groups_may_differ_from_layer_to_layer(tmp_path):
    weights = {
        "a": (4, random_weight(4, groups=1)),
        "b": (8, random_weight(8, out=40, dtype=torch.bfloat16)),
    }
    layers = {name: gptq_tensors(weight, nbits) for name, (nbits, weight) in weights.items()}
    layers["a"].pop("g_idx")
    reader = open_folder(save_layers(tmp_path, layers, V1 | {"dynamic": {"+:b": {"bits": 8}}}))
    assert [layer.spec.group_size for layer in reader.layers.values()] == [64, 32]
    for name, (_, weight) in weights.items():
        assert torch.equal(dequantized(reader, name, weight.scale.dtype), weight.dequantized)


@pytest.mark.parametrize("by_old_tool", [False, True])
def test_a_model_of_such_layers_computes_the_same(make_model, tmp_path, by_old_tool):
    model = make_model("qwen2", intermediate_size=64, tie_word_embeddings=False)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            out, columns = linear.weight.shape
            weight = random_weight(4, out, columns)
            linear.weight.data.copy_(weight.dequantized)
            layer = gptq_tensors(weight, 4)
            tensors |= {f"{name}.{key}": t.contiguous() for key, t in layer.items()}
            tensors.pop(f"{name}.weight")
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    if by_old_tool:
        (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    else:
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": V1}))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        logits = load_foreign(tmp_path)(ids).logits
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config", [{"checkpoint_format": "gptq_p"}, {"format": "marlin"}, {"is_marlin_format": True}]
)
def test_other_layouts(tmp_path, config):
    layers = {"m": gptq_tensors(random_weight(4), 4)}
    with pytest.raises(UserError, match=r"checkpoint_format=\w+ cannot be taken over; of gptq"):
        open_folder(save_layers(tmp_path, layers, V1 | config))


def test_act_order(tmp_path):
    layer = gptq_tensors(random_weight(4), 4)
    layer["g_idx"] = layer["g_idx"].flip(0)
    with pytest.raises(UserError, match=r"act-order \(desc_act=true\) of m cannot be taken over"):
        open_folder(save_layers(tmp_path, {"m": layer}, V1))


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("scales", None, r"m\.scales is missing"),
        ("qzeros", None, r"m\.qzeros is missing"),
        ("qzeros", torch.zeros(2, 20, dtype=torch.int32), r"shapes of m are not those of \(8, 4"),
        ("qzeros", torch.zeros(3, 8, dtype=torch.int32), r"qzeros is \[3, 8\] int32, expected"),
        ("qweight", torch.zeros(8, 64), r"qweight is \[8, 64\] float32, expected"),
        (
            "qweight",
            torch.zeros(7, 64, dtype=torch.int32),
            r"g_idx is \[64\] int32, expected",
        ),
        ("scales", torch.zeros(5, 64), r"m has 5 groups for 64 columns"),
        ("scales", torch.zeros(0, 64), r"m has 0 groups"),
        ("scales", torch.zeros(64), r"m\.scales \[64\] is no matrix"),
        ("scales", torch.zeros(2, 64, dtype=torch.int8), r"scales is \[2, 64\] int8, expected"),
        ("g_idx", torch.zeros(63, dtype=torch.int32), r"g_idx is \[63\] int32, expected \[64\]"),
    ],
)
def test_a_damaged_layer(tmp_path, key, tensor, message):
    folder = save_layers(tmp_path, {"m": gptq_tensors(random_weight(4), 4)}, V1)
    stored = load_file(folder / "model.safetensors")
    stored.pop(f"m.{key}")
    save_file(stored | ({} if tensor is None else {f"m.{key}": tensor}),
              folder / "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=message):
        open_folder(folder)
