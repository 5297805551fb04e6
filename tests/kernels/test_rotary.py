"""Rotary position embeddings, in plain PyTorch and in Triton, beside those of transformers."""

import pytest
import torch
from kernel_weights import DEVICE
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hqqtrain_kernels.rotary import rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("each_backend")


def random_inputs(
    dtype: torch.dtype, *, sequences: int = 2, tokens: int = 5, heads: int = 3, key_heads: int = 1,
    size: int = 12, positions: int = 2,
) -> list[Tensor]:  # fmt: skip
    """Return query, key, cos and sin; query and key are transposed, as attention has them."""
    shapes = [(sequences, tokens, number, size) for number in (heads, key_heads)]
    query, key = (torch.randn(shape, device=DEVICE).to(dtype).transpose(1, 2) for shape in shapes)
    angles = torch.randn(positions, tokens, size // 2, device=DEVICE).repeat(1, 1, 2)
    return [query, key, angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"positions": 1}, {"size": 128, "heads": 4, "key_heads": 4}, {"tokens": 0}, {"size": 2}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_like_transformers(dtype: torch.dtype, sizes: dict[str, int], inverse: bool) -> None:
    query, key, cos, sin = random_inputs(dtype, **sizes)
    before = query.clone()
    found = rotate(query, key, cos, sin, inverse=inverse)
    exact = [x.double() for x in (query, key, cos, -sin if inverse else sin)]
    eps = max(2 * torch.finfo(dtype).eps, 1e-6)
    for ours, theirs in zip(found, apply_rotary_pos_emb(*exact), strict=True):
        assert (ours.dtype, ours.shape) == (dtype, theirs.shape)
        torch.testing.assert_close(ours.double(), theirs, rtol=eps, atol=eps)
    assert torch.equal(query, before)


def test_any_strides() -> None:
    query, key, cos, sin = random_inputs(torch.float32, size=8)
    wanted = rotate(query, key, cos, sin)
    wide = torch.randn(2, 3, 5, 24, device=DEVICE)
    wide[..., 8:16] = query
    padded = [torch.cat((x, x), dim=-1)[..., :8] for x in (cos, sin)]
    found = rotate(wide[..., 8:16], key.contiguous(), *padded)
    assert all(map(torch.equal, found, wanted))
    assert found[0].transpose(1, 2).is_contiguous()
