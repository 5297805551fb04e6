"""Device functions of the solvers, compared with the grid that they reproduce, bit for bit."""

import pytest
import torch
from kernel_weights import DEVICE
from torch import Tensor

from hqqtrain.quant.grid import FixedPoint, QuantGrid, power_of_two
from hqqtrain_kernels.solver_params import RTNParams

pytest.importorskip("triton", reason="Triton is not installed here")
import triton
from triton import language as tl

from hqqtrain_kernels import solve_triton
from hqqtrain_kernels.solve_triton import (
    as_stored,
    code_index,
    encode,
    group_max,
    group_min,
    load_weights,
    per_group,
    to_fixed_point,
)
from hqqtrain_kernels.tile_triton import TileConfig

R, G, T, E = 2, 4, 2, 8
GROUP = R * T * E
MAGIC_BITS = solve_triton.MAGIC_BITS.value


def tile_config(nbits: int = 4, meta_dtype: torch.dtype = torch.float32) -> TileConfig:
    limits = torch.finfo(meta_dtype)
    return TileConfig(
        axis=1,
        nbits=nbits,
        group_size=GROUP,
        cell_groups=1,
        low_plane_tiles=1,
        unit_length=GROUP,
        packs=False,
        solver="rtn",
        params=RTNParams(),
        meta_min=max(limits.smallest_normal * limits.eps, 2.0**-126),
        meta_max=limits.max,
        R=R,
        G=G,
        T=T,
        E=E,
    )


@triton.jit
def ranges_kernel(W_ptr, ranges_ptr, x_ptr, fixed_ptr, BITS: tl.constexpr, TILE: tl.constexpr):
    """Write minimum, maximum, mean and step of every group, and its weights in fixed point."""
    group = tl.arange(0, TILE.G)
    GROUP_SIZE: tl.constexpr = TILE.group_size
    k = code_index(tl.arange(0, TILE.R)[:, None, None, None], TILE.R, TILE.T, TILE.E)
    W = load_weights(
        W_ptr=W_ptr,
        origin=group.to(tl.int64) * GROUP_SIZE,
        exists=group < TILE.G,
        stride=1,
        k=k,
        EVICTION="evict_last",
        TILE=TILE,
    )
    low, high = group_min(W), group_max(W)
    x, magic_bits, _, mean, step = to_fixed_point(
        W=W, mask=None, low=low, high=high, GROUP_SIZE=GROUP_SIZE, BITS=BITS
    )
    tl.store(ranges_ptr + group, low)
    tl.store(ranges_ptr + TILE.G + group, high)
    tl.store(x_ptr + per_group(group * GROUP_SIZE) + k, x - per_group(magic_bits))
    tl.store(fixed_ptr + group, mean)
    tl.store(fixed_ptr + TILE.G + group, step)


@triton.jit
def codes_kernel(W_ptr, scale_ptr, zero_ptr, codes_ptr, TILE: tl.constexpr):
    """Write the codes of G groups, with the offset of `nearest_codes`."""
    group = tl.arange(0, TILE.G)
    k = code_index(tl.arange(0, TILE.R)[:, None, None, None], TILE.R, TILE.T, TILE.E)
    at = per_group(group * TILE.group_size) + k
    inverse_scale = tl.div_rn(1.0, tl.load(scale_ptr + group))
    codes = encode(
        tl.load(W_ptr + at),
        inverse_scale=inverse_scale,
        zero=tl.load(zero_ptr + group),
        NBITS=TILE.nbits,
    )
    tl.store(codes_ptr + at, codes)


@triton.jit
def stored_kernel(scale_ptr, zero_ptr, magnitude_ptr, META_DTYPE: tl.constexpr, TILE: tl.constexpr):
    """Replace scale and zero of G groups by what storage makes of them."""
    group = tl.arange(0, TILE.G)
    scale, zero = as_stored(
        scale=tl.load(scale_ptr + group),
        zero=tl.load(zero_ptr + group),
        magnitude=tl.load(magnitude_ptr + group),
        META_DTYPE=META_DTYPE,
        TILE=TILE,
    )
    tl.store(scale_ptr + group, scale)
    tl.store(zero_ptr + group, zero)


def normalized_groups() -> Tensor:
    """Return G groups [G, GROUP], each divided by a power of two, as solvers see them."""
    W = torch.randn(G, GROUP, device=DEVICE) * torch.tensor([[1.0], [1e-3], [5.0], [1e4]]).to(
        DEVICE
    )
    return W / power_of_two(W.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("bits", [13, 20])
def test_ranges_and_fixed_point(bits: int) -> None:
    W = normalized_groups()
    expected = FixedPoint.from_float(W.T, bits)
    ranges, fixed = torch.empty(2, 2, G, device=DEVICE)
    x = torch.empty(G, GROUP, dtype=torch.int32, device=DEVICE)
    ranges_kernel[(1,)](W, ranges, x, fixed, BITS=bits, TILE=tile_config(), enable_fp_fusion=False)
    assert torch.equal(ranges, torch.stack([W.amin(1), W.amax(1)]))
    assert torch.equal(x.double(), expected.x.T)
    assert torch.equal(fixed, torch.stack([expected.mean(), expected.step]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ranges_show_what_is_not_finite(bad: float) -> None:
    W = normalized_groups()
    W[1, 3] = bad
    ranges, fixed = torch.empty(2, 2, G, device=DEVICE)
    x = torch.empty(G, GROUP, dtype=torch.int32, device=DEVICE)
    ranges_kernel[(1,)](W, ranges, x, fixed, BITS=13, TILE=tile_config(), enable_fp_fusion=False)
    finite = ranges.isfinite().all(0)
    assert finite.tolist() == [True, False, True, True]


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_nearest_codes_of_weights_inside_and_outside_of_the_range(nbits: int) -> None:
    W = normalized_groups()
    low, high = W.amin(1), W.amax(1)
    grid = QuantGrid(nbits, torch.ones(G, device=DEVICE), torch.float32)
    scale = power_of_two((high - low) / grid.max_code)  # so that quotients are exact; codes clip
    zero = (-low / scale).round()
    codes = torch.empty(G, GROUP, dtype=torch.int32, device=DEVICE)
    codes_kernel[(1,)](W, scale, zero, codes, TILE=tile_config(nbits), enable_fp_fusion=False)
    expected = grid.encode(W.T, scale, zero).T
    assert torch.equal((codes - (MAGIC_BITS - (nbits << 23))).float(), expected)


@pytest.mark.parametrize("meta_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_and_zero_as_storage_rounds_them(meta_dtype: torch.dtype) -> None:
    dtypes = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    magnitude = torch.tensor([1.0, 2.0**-12, 2.0**20, 2.0**-120], device=DEVICE)
    scale = torch.tensor([0.3, 1e-3, 0.7, 1e-7], device=DEVICE)
    zero = torch.tensor([1.7, -3e6, 255.3, 0.0], device=DEVICE)  # -3e6 is too large for fp16
    expected = [t.float() for t in QuantGrid(4, magnitude, meta_dtype).to_meta_dtype(scale, zero)]
    config = tile_config(meta_dtype=meta_dtype)
    stored_kernel[(1,)](
        scale, zero, magnitude, META_DTYPE=dtypes[meta_dtype], TILE=config, enable_fp_fusion=False
    )
    assert torch.equal(scale, expected[0])
    assert torch.equal(zero, expected[1])
