"""Checkpoints that the installed hqq has written, in both of its forms."""

import json
from pathlib import Path

import pytest
import torch
from foreign_models import dequantized, load_foreign, open_folder
from safetensors.torch import load_file, save_file

from hqqtrain.common.errors import UserError
from hqqtrain.config.model import ModelConfig
from hqqtrain.models.foreign import qmodel
from hqqtrain.models.source import resolve_source

hqq_hf = pytest.importorskip("hqq.models.hf.base", reason="hqq is not installed here")
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # noqa: E402

K = "model.layers.0.self_attn.k_proj"
CASES = [(8, 1, False), (4, 1, True), (3, 1, False), (2, 1, False), (1, 1, False), (8, 0, False),
         (4, 0, True), (3, 0, False), (2, 0, True), (1, 0, False)]  # fmt: skip


def quantize(model: torch.nn.Module, nbits: int = 4, axis: int = 1, *, view: bool = False,
             dtype: torch.dtype = torch.float32) -> torch.nn.Module:  # fmt: skip
    config = BaseQuantizeConfig(nbits=nbits, group_size=16, axis=axis, view_as_float=view)
    hqq_hf.AutoHQQHFModel.quantize_model(model, config, compute_dtype=dtype, device="cpu")
    return model


@pytest.fixture
def saved(make_model, tmp_path) -> Path:
    model = quantize(make_model(tie_word_embeddings=False))
    hqq_hf.AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "model"))
    return tmp_path / "model"


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace or remove tensors of one layer."""
    stored = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        stored.pop(f"{K}.{key}") if tensor is None else stored.update({f"{K}.{key}": tensor})
    save_file(stored, folder / "model.safetensors")


def check_same(folder: Path, model: torch.nn.Module) -> None:
    """Check that the model in `folder` is `model`, weight for weight and in its logits."""
    reader, ids = open_folder(folder), torch.arange(16)[None]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, HQQLinear)}
    assert reader.layers.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(dequantized(reader, name, torch.float32), layer.dequantize())
        assert reader.layers[name].spec.nbits == layer.meta["nbits"]
    with torch.no_grad():
        logits = load_foreign(folder)(ids).logits
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("nbits", "axis", "view"), CASES)
def test_the_model_is_the_same_to_the_bit(make_model, tmp_path, nbits, axis, view):
    model = quantize(
        make_model("qwen2", tie_word_embeddings=False, num_hidden_layers=1), nbits, axis, view=view
    )
    hqq_hf.AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "model"))
    check_same(tmp_path / "model", model)


def test_a_pickle_is_converted_once(make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HQQTRAIN_CACHE", str(tmp_path / "cache"))
    model = quantize(make_model("qwen2", num_hidden_layers=1), 3, axis=0)
    hqq_hf.AutoHQQHFModel.save_quantized(model, str(tmp_path / "model"))
    first = resolve_source(ModelConfig(name_or_path=str(tmp_path / "model")))
    assert first.tokenizer == tmp_path / "model"
    monkeypatch.setattr(qmodel.subprocess, "run", None)
    check_same(tmp_path / "model", model)
    (entry,) = (path for path in (tmp_path / "cache" / "converted").iterdir() if path.is_dir())
    assert entry == first.path


def test_the_dtype_of_scale_and_zero_is_kept(make_model, tmp_path):
    model = quantize(make_model(tie_word_embeddings=False).bfloat16(), dtype=torch.bfloat16)
    hqq_hf.AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "model"))
    reader = open_folder(tmp_path / "model")
    assert reader.layers[K].spec.meta_dtype == torch.bfloat16
    theirs = model.get_submodule(K).dequantize()
    ours = dequantized(reader, K, torch.bfloat16)
    assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7)  # hqq rounds twice


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"nbits": None}, r"k_proj\.nbits is missing\. Only checkpoints of hqq 0\.2"),
        ({"scale": None}, r"k_proj\.scale is missing\. hqq before 0\.2"),
        ({"zero": None}, r"k_proj\.zero is missing"),
        ({"nbits": torch.tensor(6)}, r"nbits=6 packed as '4bit_u8' cannot be taken over"),
        ({"nbits": torch.zeros(999)}, r"k_proj\.nbits has the shape \[999\]"),
        ({"nbits": torch.zeros(0)}, r"k_proj\.nbits has the shape \[0\]"),
        ({"group_size": torch.tensor(0)}, r"k_proj cannot be taken over"),
        ({"group_size": torch.tensor(24)}, r"group_size=24: does not divide 32"),
        ({"group_size": torch.tensor(float("inf"))}, r"settings of its layers are damaged"),
        ({"group_size": torch.tensor(16.5)}, r"k_proj: group_size=16\.5 is no integer"),
        ({"axis": torch.tensor(7)}, r"axis=7"),
        ({"shape": torch.tensor([512])}, r"shape \[512\], which is not that of a matrix"),
        ({"shape": torch.tensor([1 << 40, 32])}, r"k_proj\.scale is \[32, 1\] float32, expected"),
        ({"W_q": torch.zeros(7, 16, dtype=torch.uint8)}, r"k_proj\.W_q is \[7, 16\] uint8"),
        ({"zero": torch.zeros(32, 1, dtype=torch.float16)}, r"k_proj\.zero is \[32, 1\] float16"),
    ],
)
def test_a_damaged_layer(saved, tensors, message):
    change(saved, **tensors)
    with pytest.raises(UserError, match=message):
        open_folder(saved)


def test_a_scale_that_is_not_finite(saved):
    change(saved, scale=torch.full((32, 1), float("nan")))
    with pytest.raises(UserError, match=r"a scale of .*k_proj is infinite or NaN"):
        open_folder(saved).read(f"{K}.scale")


def test_a_truncated_file(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_folder(saved)


def test_a_layer_that_the_model_does_not_have(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"layers\.1\..* which the model does not have"):
        load_foreign(saved)
