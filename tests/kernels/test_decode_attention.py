"""The operator computes attention of one token, with two products where there is no kernel."""

import pytest
import torch

from hqqtrain_kernels.decode_attention import decode_attention


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_attention_and_can_be_traced(dtype, mask):
    torch.manual_seed(0)
    query = torch.randn(2, 3, 4, 8).to(dtype)
    key, value = torch.randn(2, 2, 3, 9, 8).to(dtype)
    rows = None
    if mask is not None:
        rows = torch.rand(2, 9) < 0.7 if mask == torch.bool else torch.randn(2, 9)
        rows[:, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.3,
        attn_mask=None if rows is None else rows[:, None, None].to(
            torch.bool if mask == torch.bool else torch.float64),
    )  # fmt: skip
    output = decode_attention(query, key, value, rows, 0.3)
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    arguments = (query, key, value, rows, 0.3)
    torch.library.opcheck(torch.ops.hqqtrain.decode_attention.default, arguments)
