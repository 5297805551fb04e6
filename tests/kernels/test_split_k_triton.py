"""Partial sums of splits of K, added up in their order."""

import pytest
import torch
from kernel_weights import DEVICE

pytest.importorskip("triton", reason="Triton is not installed here")
from hqqtrain_kernels.split_k_triton import programs_per_split, reduce_split_k


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("num_splits", "N", "M", "block_m"), [(1, 5, 1, 1), (9, 150, 3, 4)])
def test_sums_are_those_of_fp32_in_the_order_of_the_splits(
    num_splits: int, N: int, M: int, block_m: int, with_bias: bool
) -> None:
    partial = torch.randn(num_splits, N, block_m, device=DEVICE)
    bias = torch.randn(N, device=DEVICE).half() if with_bias else None
    y = reduce_split_k(partial, bias, torch.empty(M, 64, device=DEVICE, dtype=torch.float16))
    expected = torch.zeros(N, block_m, device=DEVICE)
    for part in partial:
        expected += part
    if bias is not None:
        expected += bias.float()[:, None]
    assert torch.equal(y, expected[:, :M].T.half())


@pytest.mark.parametrize("programs_per_sm", [1, 3, 100])
@pytest.mark.parametrize(("num_splits", "steps"), [(1, 1), (2, 7), (50, 300)])
def test_programs_share_all_steps(programs_per_sm: int, num_splits: int, steps: int) -> None:
    programs = programs_per_split(torch.device("cpu"), programs_per_sm, num_splits, steps)
    assert 1 <= programs <= steps
    # The interpreter counts as 2 multiprocessors: no more programs than they hold, if they can.
    assert programs * num_splits <= max(2 * programs_per_sm, num_splits)
