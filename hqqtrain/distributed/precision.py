"""Resolve `train.precision=auto` by what the device multiplies fast.

Many CPUs multiply bf16 twice as fast as fp32. In training the products may be in bf16 there, as
under mixed precision on a GPU, while parameters, residuals and losses stay in fp32. Evaluation and
quantization stay in fp32, so their results are those of every other CPU.
"""

import os
from collections.abc import Mapping

import torch

from hqqtrain.common.errors import UserError

ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""The values of ONEDNN_MAX_CPU_ISA that keep oneDNN from instructions for bf16."""


def resolve_precision(precision: str) -> str:
    """Resolve `train.precision`: `auto` is bf16 on a GPU that has it, otherwise fp32.

    Raises:
        UserError: fp16 is asked for on a CPU.
    """
    cuda = torch.cuda.is_available()
    if precision == "auto":
        return "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and not cuda:
        raise UserError("train.precision=fp16: needs a GPU; use fp32 or bf16 on a CPU.")
    return precision


def resolve_training_precision(precision: str) -> str:
    """Resolve `train.precision` for the products of training: `auto` may be bf16 on a CPU, too."""
    if precision == "auto" and not torch.cuda.is_available() and multiplies_bf16(os.environ):
        return "bf16"
    return resolve_precision(precision)


def multiplies_bf16(environ: Mapping[str, str]) -> bool:
    """Whether this CPU has instructions for products of bf16, which oneDNN may use.

    Args:
        environ: The environment, where ONEDNN_MAX_CPU_ISA limits the instructions.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict[str, bool])()  # not in PyTorch 2.11
    has_bf16 = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return has_bf16 and environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in ISAS_WITHOUT_BF16
