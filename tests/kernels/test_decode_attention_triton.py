"""The kernels are no further from attention in fp64 than PyTorch's own attention is."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

pytest.importorskip("triton", reason="Triton is not installed here")
from kernel_weights import DEVICE

from hqqtrain_kernels.decode_attention_triton import decode_attention, is_supported

# Truncated instead of rounded where the interpreter stores bf16.
EPSILON = 2**-8 if DEVICE == "cuda" else 2**-7


def _check(query, key, value, mask, scale=0.2):
    wide = (query.double(), key.double(), value.double())
    sdpa_mask = None if mask is None else mask[:, None, None]
    if sdpa_mask is not None and sdpa_mask.dtype != torch.bool:
        sdpa_mask = sdpa_mask.double()
    expected = sdpa(*wide, attn_mask=sdpa_mask, scale=scale)
    assert is_supported(query, key, mask)
    output = decode_attention(query, key, value, mask, scale)
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
    error = (output.double() - expected).abs().max() / value.double().abs().max()
    assert error < EPSILON


def _tensors(batch, heads, group, tokens, head_dim, dtype=torch.bfloat16):
    torch.manual_seed(tokens)
    query = torch.randn(batch, heads, group, head_dim, device=DEVICE).to(dtype)
    return query, *torch.randn(2, batch, heads, tokens, head_dim, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "tokens", "head_dim"),
    [(1, 2, 4, 1, 32), (2, 3, 1, 63, 64), (1, 2, 16, 65, 128), (1, 1, 7, 200, 256)],
)
def test_sizes(batch, heads, group, tokens, head_dim, dtype):
    _check(*_tensors(batch, heads, group, tokens, head_dim, dtype), mask=None)


@pytest.mark.parametrize("seen", [1, 64, 130])
def test_a_mask_hides_the_rest_of_the_cache(seen):
    query, key, value = _tensors(1, 2, 4, 300, 32)
    mask = torch.arange(300, device=DEVICE)[None] < seen
    key[:, :, seen:] = value[:, :, seen:] = float("nan")  # what is hidden is not read
    clean = [tensor.nan_to_num() for tensor in (key, value)]
    output = decode_attention(query, key, value, mask, 0.2)
    _check(query, *clean, mask)
    assert torch.equal(output, decode_attention(query, *clean, mask, 0.2))


def test_masks_of_rows_and_masks_that_are_added():
    tensors = _tensors(2, 2, 3, 70, 32)
    rows = torch.arange(70, device=DEVICE)[None] < torch.tensor([[3], [66]], device=DEVICE)
    _check(*tensors, rows)
    _check(*tensors, torch.randn(2, 70, device=DEVICE))
    hidden = torch.zeros(1, 70, device=DEVICE).masked_fill(~rows[1:], float("-inf"))
    _check(*tensors, hidden.to(torch.bfloat16))


def test_strides_and_large_scores():
    query, key, value = _tensors(1, 4, 2, 50, 64)
    _check(query.mT.contiguous().mT, key[:, :, ::2], value[:, :, 1::2], None, scale=20.0)


def test_what_the_kernels_do_not_compute():
    query, key, _ = _tensors(1, 1, 17, 5, 32)
    assert not is_supported(query, key, None)  # more heads than a program has
    assert not is_supported(query.float()[:, :, :4], key.float(), None)
    assert not is_supported(query[:, :, :4, :24], key[..., :24], None)
    assert not is_supported(query[:, :, :4], key, torch.zeros(1, 5, dtype=torch.int64))
