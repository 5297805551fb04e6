"""Compute a loss in chunks of tokens, so that the logits never exist all at once.

With a vocabulary of 128,256, 2,048 tokens have 1 GiB of fp32 logits, as much again for their
gradient, and half of that in 16 bits: more than the whole optimizer of a 70B model. So the output
head runs on a chunk of tokens at a time, and again in the backward pass.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqqtrain.train.losses.base import Loss


class ChunkedLoss:
    """Implements `Loss` by calling `loss` on chunks of at most `chunk_tokens` tokens.

    The backward pass computes the logits of each chunk again.
    """

    def __init__(self, loss: Loss, chunk_tokens: int) -> None:
        self._loss, self._chunk_tokens = loss, chunk_tokens

    def __call__(
        self, hidden: Tensor, head: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        losses, counts = [], []
        columns = [tensor.split(self._chunk_tokens) for tensor in batch.values()]
        for hidden_chunk, *chunk in zip(hidden.split(self._chunk_tokens), *columns, strict=True):
            named = dict(zip(batch, chunk, strict=True))
            loss, count = checkpoint(self._loss, hidden_chunk, head, named, use_reentrant=False)
            losses.append(loss)
            counts.append(count)
        return torch.stack(losses).sum(), torch.stack(counts).sum()
