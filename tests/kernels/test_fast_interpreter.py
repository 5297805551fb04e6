"""The replaced steps of Triton's interpreter give what the steps of the release give."""

import pytest
import torch

fast_interpreter = pytest.importorskip("fast_interpreter", reason="Triton is not installed here")
import triton  # noqa: E402
from triton import language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no interpreter")


@triton.jit
def _last(a, b):
    return tl.where(b == b, a * 0.5 + b, a)


@triton.jit
def _smaller_by_key(key, value, other_key, other_value):
    first = key <= other_key
    return tl.where(first, key, other_key), tl.where(first, value, other_value)


@triton.jit
def _reductions(x, flat, rows, keys, values, size: tl.constexpr):
    i, j = tl.arange(0, size), tl.arange(0, 4)
    tile = tl.load(x + i[:, None] * 4 + j[None, :])
    tl.store(flat, tl.reduce(tl.reduce(tile, 1, _last), 0, _last))
    tl.store(rows + j[None, :], tl.reduce(tile, 0, _last, keep_dims=True))
    key, value = tl.reduce((tile, tile + 1), 1, _smaller_by_key)
    tl.store(keys + i, key)
    tl.store(values + i, value)
    tl.store(flat + 1, tl.reduce(tile, None, _last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_reductions_are_those_of_the_release(dtype: torch.dtype) -> None:
    x = torch.randn(8, 4)
    x[3, 2] = float("nan")

    def reduce() -> list[torch.Tensor]:
        out = [torch.zeros(n, dtype=dtype) for n in (2, 4, 8, 8)]
        _reductions[(1,)](x.to(dtype), *out, size=8)
        return out

    ours = reduce()
    with fast_interpreter.as_released():
        theirs = reduce()
    assert all(map(torch.equal, ours, theirs)), (ours, theirs)
    assert ours[0].isfinite().all()
