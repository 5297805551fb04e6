"""Norms and rotary embeddings that a kernel computes; those that it does not keep their code."""

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hqqtrain.training.fused_modules import FusedRotation, fuse_modules, fuse_norms, fuse_rotations

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture(autouse=True)
def _plain_rotations() -> Iterator[None]:
    yield
    for code in list(sys.modules.values()):
        # Some packages put objects without a __dict__ in sys.modules.
        rotation = getattr(code, "__dict__", {}).get("apply_rotary_pos_emb")
        if isinstance(rotation, FusedRotation):
            code.apply_rotary_pos_emb = rotation.plain  # type: ignore[attr-defined]


def make_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    make_config, make = FAMILIES[family]
    model = make(make_config(**SIZES)).to(dtype).requires_grad_(False)
    for name, param in model.named_parameters():
        if "norm" in name:
            param.data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_families(family: str, dtype: torch.dtype):
    model = make_model(family, dtype)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    tokens, names = torch.arange(12)[None], list(model.state_dict())
    expected = model(tokens).logits
    fused = fuse_norms(model, CPU)
    assert list(fused) == norms
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0.02, atol=0.02)
    assert list(model.state_dict()) == names
    params = fused[norms[0]]
    assert params.eps == model.config.rms_norm_eps
    assert params.offset == (1.0 if family == "gemma2" else 0.0)
    if dtype == torch.bfloat16:
        assert params.casting == {"gemma2": "gemma", "olmo2": "gemma"}.get(family, "llama")


def test_without_gradients_the_model_runs_its_own_code():
    model, tokens = make_model("llama", torch.bfloat16), torch.arange(12)[None]
    with torch.no_grad(), ExitStack() as undo:
        expected = model(tokens).logits
        assert fuse_norms(model, CPU, undo)
        assert fuse_rotations(model, CPU, undo)
        assert torch.equal(model(tokens).logits, expected)


def test_what_is_replaced_comes_back():
    model = make_model("llama")
    code = sys.modules[type(model).__module__]
    rotate = code.apply_rotary_pos_emb
    with ExitStack() as undo:
        fuse_norms(model, CPU, undo)
        fuse_rotations(model, CPU, undo)
        assert code.apply_rotary_pos_emb is not rotate
    assert code.apply_rotary_pos_emb is rotate
    assert not any("forward" in vars(part) for part in model.modules())


def test_a_trained_norm_and_an_unusual_one_keep_their_code():
    model = make_model("llama")
    model.model.norm.requires_grad_()

    class CubicRMSNorm(type(model.model.norm)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) ** 3

    model.model.layers[0].input_layernorm.__class__ = CubicRMSNorm
    assert len(fuse_norms(model, CPU)) == 3
    assert "forward" not in vars(model.model.norm)
    assert "forward" not in vars(model.model.layers[0].input_layernorm)


def test_a_dtype_without_a_kernel_takes_the_plain_path():
    model = make_model("llama")
    norm = model.model.norm
    hidden = torch.randn(3, 64, dtype=torch.float64)
    expected = norm(hidden)
    assert norm in fuse_norms(model, CPU)
    assert torch.equal(norm(hidden), expected)


def test_rotations():
    model = make_model("llama")
    assert fuse_rotations(model, CPU) == 1
    code = sys.modules[type(model).__module__]
    rotation = code.apply_rotary_pos_emb
    assert isinstance(rotation, FusedRotation)
    assert fuse_rotations(model, CPU) == 1  # once
    calls: list[torch.device] = []

    def plain(q: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(q.device)
        return original(q, *rest)

    original, rotation.plain = rotation.plain, plain
    model(torch.arange(12)[None])
    rotation.plain = original
    assert calls == [CPU, CPU], "a tensor of the CPU takes the plain path"


def test_a_partial_rotation_keeps_its_code():
    sizes = SIZES | {"partial_rotary_factor": 0.5}
    model = NemotronForCausalLM(NemotronConfig(**sizes)).requires_grad_(False)
    assert not fuse_norms(model, CPU)  # its norms are LayerNorms
    tokens = torch.arange(12)[None]
    expected = model(tokens).logits
    fuse_rotations(model, CPU)
    assert torch.equal(model(tokens).logits, expected)


def test_without_a_gpu_nothing_changes():
    model = make_model("llama")
    fuse_modules(model, CPU)
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_a_gpu(family: str):
    """Loss and gradients of a bf16 model with adapters are those of the plain code."""
    model: Any = make_model(family, torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])).cuda()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_(std=0.1)
    tokens = torch.randint(0, 96, (2, 64), device="cuda")
    truth = copy.deepcopy(model).float()

    def loss_and_gradients(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
        return [loss.detach().float(), torch.cat(grads)]

    exact = loss_and_gradients(truth)
    plain = loss_and_gradients(model)
    fuse_modules(model, torch.device("cuda"))
    assert any("forward" in vars(part) for part in model.modules())
    fused = loss_and_gradients(model)
    for ours, theirs, true in zip(fused, plain, exact, strict=True):
        assert (ours - true).norm() <= 1.2 * (theirs - true).norm() + 1e-3 * true.norm()
