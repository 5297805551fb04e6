"""The kernel of the package liger-kernel that training uses, if it is installed.

It runs on CUDA tensors, and in Triton's interpreter on those of a CPU, too.
"""

from functools import cache
from importlib import util

import torch
from torch import Tensor

MAX_BLOCK = 32768
"""Most logits that a program of the cross-entropy kernel reads at a time."""


@cache
def has_liger() -> bool:
    """Whether liger-kernel, and Triton with it, is installed."""
    return all(util.find_spec(name) for name in ("liger_kernel", "triton"))


def cross_entropy_(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the cross-entropy of each row, and overwrite `logits` with the gradient of their sum.

    Args:
        logits: [tokens, vocabulary], contiguous, of any floating-point dtype; it is overwritten.
        labels: int64 [tokens].
        ignore_index: The label of rows whose loss and gradient are 0.

    Returns:
        fp32 [tokens]; it is computed in fp32.
    """
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    rows, vocabulary = logits.shape
    losses = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return losses
    with torch.cuda.device_of(logits):
        # liger's own functions ask the device for the number of labels, which a sum does not need.
        liger_cross_entropy_kernel[(rows,)](
            X_ptr=logits, X_stride=logits.stride(0), Y_ptr=labels, Y_stride=labels.stride(0),
            weight_ptr=None, loss_ptr=losses, z_loss_ptr=None, loss_stride=1,
            token_accuracy_ptr=None, token_accuracy_stride=0,
            predicted_tokens_ptr=None, predicted_tokens_stride=0,
            n_cols=vocabulary, n_non_ignore=1, sum_non_ignore_weight=1, weight_sum=0.0,
            ignore_index=ignore_index, lse_square_scale=0.0, label_smoothing=0.0,
            reduction="sum", softcap=None, RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False, HAS_WEIGHT=False, HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=True, BLOCK_SIZE=min(MAX_BLOCK, 1 << (vocabulary - 1).bit_length()),
            num_warps=32,
        )  # fmt: skip
    return losses
