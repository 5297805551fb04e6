"""Rotary position embeddings as an autograd function: their gradients are autograd's."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hqqtrain.nn.rotary import is_computable, rotate


def random_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    angles = torch.randn(2, 6, 8).repeat(1, 1, 2)
    return query, key, angles.cos(), angles.sin()


def test_gradients() -> None:
    query, key, cos, sin = random_inputs()
    query, key = query.requires_grad_(), key.requires_grad_()
    wanted, found = apply_rotary_pos_emb(query, key, cos, sin), rotate(query, key, cos, sin)
    torch.testing.assert_close(found, wanted)
    grads = [torch.randn_like(x) for x in wanted]
    grads[1] = grads[1].transpose(2, 3).contiguous().transpose(2, 3)  # its rows are not adjacent
    ours, theirs = (torch.autograd.grad(each, (query, key), grads) for each in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_what_is_not_computable() -> None:
    query, key, cos, sin = random_inputs()
    assert is_computable(query, key, cos, sin)
    assert is_computable(query, key, cos[:1], sin[:1])
    assert not is_computable(query, key, cos[..., :8], sin[..., :8]), "a partial rotation"
    assert not is_computable(query.bfloat16(), key.bfloat16(), cos, sin)
    assert not is_computable(query.double(), key.double(), cos.double(), sin.double())
    assert not is_computable(query.transpose(2, 3), key, cos, sin)
    assert not is_computable(query, key, cos[0], sin[0])
