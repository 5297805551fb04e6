"""Programmatic dependent launch (PDL): a kernel starts before the kernel ahead of it has ended.

For few rows of x a product takes little longer than its launch, so hiding launches pays.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from hqqtrain_kernels.launcher_triton import INTERPRETED


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Whether a kernel on `device` can start before the kernel ahead of it has ended.

    GPUs can do so since compute capability 9.0.
    """
    if INTERPRETED:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (9, 0)
    return driver.active.get_current_target().arch >= 90  # compiled for a GPU that is not there


@triton.jit
def wait_for_kernel_ahead(PDL: tl.constexpr):
    """Wait for the results of the kernel ahead; a kernel with PDL calls it before it reads any.

    The next kernel may start from now on, and waits in turn. A weight counts as a result, too: the
    kernel ahead may have gathered its shards. To read it earlier would save 2 to 4 % of the time,
    and to prefetch it into the L2 cache saves nothing (H200).
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
