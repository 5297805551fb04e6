"""The kernels of the package liger-kernel that training uses, if it is installed.

They run on CUDA tensors. In Triton's interpreter, the cross-entropy and the rotary embedding run on
CPU tensors, too.
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


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, offset: float, casting: str) -> Tensor:
    """Return the RMSNorm of the last dimension of `hidden`, in its dtype.

    Args:
        hidden: [..., hidden_size].
        weight: [hidden_size].
        eps: Is added to the mean square.
        offset: Is added to the weight: 1 for Gemma, otherwise 0.
        casting: `llama` rounds to the dtype of `hidden` before it multiplies by the weight, and
            `gemma` after it.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # The gradient must not be overwritten in place: a residual connection may share it.
    return LigerRMSNormFunction.apply(hidden, weight, eps, offset, casting, False)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return query and key with rotary position embeddings, as Llama has them.

    Args:
        query: [sequences, heads, tokens, head_size].
        key: [sequences, key_heads, tokens, head_size].
        cos: [sequences or 1, tokens, head_size], whose second half repeats the first.
        sin: As `cos`.
    """
    from liger_kernel.ops.rope import LigerRopeFunction

    # The kernel writes into a contiguous input, which another part of the model may still read.
    query, key = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
                  for x in (query, key))  # fmt: skip
    return LigerRopeFunction.apply(query, key, cos, sin)
