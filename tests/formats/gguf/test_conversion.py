"""Names, the order of rows and norms of each family, as llama.cpp expects them."""

import pytest
import torch
from exports import model_export
from quantized_models import trained_model
from random_models import random_family

from hqqtrain.formats.gguf.conversion import FamilyConversion


def _conversion(kind: str, folder, **sizes) -> FamilyConversion:
    trained = trained_model(random_family(kind, **sizes), folder / "source", solver="rtn")
    return FamilyConversion(model_export(trained), torch.float16)


def test_the_rows_of_q_and_k_of_a_llama(tmp_path):
    """A head has 8 rows; its first half is rotated against its second."""
    conversion = _conversion("llama", tmp_path)
    order = conversion.order("model.layers.0.self_attn.q_proj.weight")
    assert order.tolist()[:9] == [0, 4, 1, 5, 2, 6, 3, 7, 8]
    assert len(conversion.order("model.layers.0.self_attn.k_proj.bias")) == 16
    assert conversion.order("model.layers.0.self_attn.v_proj.weight") is None
    tensor = torch.arange(32.0)
    assert conversion.dense("model.layers.0.self_attn.q_proj.bias", tensor)[1] == 4


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "phi3"])
def test_other_families_keep_their_rows(tmp_path, kind):
    conversion = _conversion(kind, tmp_path)
    assert conversion.order("model.layers.0.self_attn.q_proj.weight") is None


def test_norms_of_gemma_have_their_offset(tmp_path):
    conversion = _conversion("gemma3_text", tmp_path)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert conversion.dense(name, torch.zeros(2)).tolist() == [1, 1]
    assert conversion.dense("model.embed_tokens.weight", torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("phi3", {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}),
        ("gemma3_text", {"pre_feedforward_layernorm": "ffn_norm",
                         "post_feedforward_layernorm": "post_ffw_norm"}),
        ("qwen3", {"self_attn.q_norm": "attn_q_norm", "mlp.up_proj": "ffn_up"}),
    ],
)  # fmt: skip
def test_names(tmp_path, kind, names):
    conversion = _conversion(kind, tmp_path)
    for name, expected in names.items():
        found = conversion.name(f"model.layers.1.{name}.weight")
        assert found == f"blk.1.{expected}.weight"
    assert "token_embd.weight" in conversion.entries()
    assert ("output.weight" in conversion.entries()) == (kind != "gemma3_text")
