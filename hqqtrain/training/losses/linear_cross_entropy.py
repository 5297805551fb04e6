"""The cross-entropy of the next token for a frozen head, with its gradient, in the forward pass.

`ChunkedLoss` computes each chunk of logits twice, because it cannot keep them for the backward
pass. The gradient of a frozen head is needed for its input only, and a sum over tokens has the same
gradient whatever comes after it, up to a factor. So both are made while a chunk of logits exists:

1. The logits of a chunk are computed, `hidden @ weight.T`, in 16 bits under autocast.
2. The loss of each token is computed in fp32, and the logits become their own gradient in place.
3. The gradient of the chunk of hidden states is `gradient @ weight`.

The backward pass multiplies by the gradient of the loss. liger-kernel does the second step on a
GPU in one kernel; otherwise PyTorch does it with an fp32 copy of the chunk.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqtrain.compat import has_hooks
from hqqtrain.data.sequences import IGNORE_INDEX
from hqqtrain.nn import liger
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain_kernels.autocast import product_dtype

MAX_CHUNK_BYTES = 1 << 27
"""Most bytes of the logits of one chunk and of their fp32 copy, if there is one."""

SCALED_ROWS = 2048
"""Tokens whose gradient has an fp32 copy at a time in the backward pass."""


class LinearCrossEntropy:
    """Implements `Loss` like `NextTokenLoss`, for a head that `is_frozen_linear` accepts."""

    def __call__(
        self, hidden: Tensor, head: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        weight, bias = _dense_weight(head, product_dtype(hidden))
        loss = _LinearCrossEntropy.apply(hidden, weight, bias, labels)
        return loss, (labels != IGNORE_INDEX).sum()


def is_frozen_linear(head: Any) -> bool:
    """Whether `head` is a frozen linear layer, quantized or not, that nothing but itself computes.

    A layer with adapters or with hooks, such as one whose weight is in host memory, is none.
    """
    is_plain = type(head) is nn.Linear or (type(head) is HQQLinear and head.fetch_meta is None)
    return (
        is_plain
        and not any(param.requires_grad for param in head.parameters())
        and not has_hooks(head)
    )


@torch.no_grad()
def _dense_weight(head: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return the weight [vocabulary, hidden_size] and the bias of `head` in `dtype`."""
    weight = head.dequantize(dtype) if isinstance(head, HQQLinear) else head.weight.to(dtype)
    return weight, None if head.bias is None else head.bias.to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of a linear layer with a frozen weight, as an fp32 scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        uses_kernel = hidden.is_cuda and liger.has_liger()
        rows = _chunk_rows(weight, uses_kernel)
        gradient = torch.empty_like(hidden)
        losses = []
        for chunk, own_labels, out in zip(
            hidden.split(rows), labels.split(rows), gradient.split(rows), strict=True
        ):
            logits = F.linear(chunk.to(weight.dtype), weight, bias)
            if uses_kernel:
                losses.append(liger.cross_entropy_(logits, own_labels, IGNORE_INDEX).sum())
            else:
                loss, logits = _cross_entropy(logits, own_labels)
                losses.append(loss)
            out.copy_(logits @ weight)
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty_like(gradient)
        for part, out in zip(gradient.split(SCALED_ROWS), scaled.split(SCALED_ROWS), strict=True):
            # In 16 bits the factor would be rounded, and with it all gradients be too large or
            # too small by up to 0.4 %.
            out.copy_(part.float() * grad_outputs[0])
        return scaled, None, None, None


def _chunk_rows(weight: Tensor, uses_kernel: bool) -> int:
    """Return the number of tokens whose logits exist at a time."""
    itemsize = weight.element_size() if uses_kernel else weight.element_size() + 4
    return max(1, MAX_CHUNK_BYTES // (len(weight) * itemsize))


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy, an fp32 scalar, and its gradient, like `logits`."""
    log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = F.nll_loss(log_probs, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    is_label = labels != IGNORE_INDEX
    gradient = log_probs.exp_().mul_(is_label[:, None])
    gradient.scatter_add_(1, labels.clamp(min=0)[:, None], -is_label[:, None].to(gradient.dtype))
    return loss, gradient.to(logits.dtype)
