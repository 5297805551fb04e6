"""The loss of a model on a batch: runs the model and decides how its logits are computed."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqqtrain.data.loader import Batch
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.causal_lm import MAX_TRAINING_LOGITS, next_token_outputs
from hqqtrain.models.families.structure import output_head
from hqqtrain.models.fqn import base_model
from hqqtrain.train.losses.hidden_states import (
    next_token_hidden_states,
    returns_head_output,
)
from hqqtrain.train.losses.registry import Loss

logger = logging.getLogger(__name__)


class ModelLoss:
    """Computes `loss` on the outputs of `model`, in chunks if a batch has many logits.

    The decision to use chunks depends on `max_tokens` and not on the batch, because ranks have
    batches of different lengths and must all do the same. Chunks require that the model does not
    change its head's output (some models cap it); the constructor tests this with one forward pass.

    Args:
        model: May be wrapped or sharded. Creating and calling a `ModelLoss` are collectives.
        loss: The loss of hidden states or logits.
        comm: All ranks of the run.
        max_tokens: Largest number of tokens in a batch.
        may_call_head_alone: Whether the head may be called by itself, a different number of times
            on each rank.
        autocast: Makes the context of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        comm: Communicator,
        *,
        max_tokens: int,
        may_call_head_alone: bool = True,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._model, self._loss, self._head = model, loss, output_head(model)
        self._autocast = autocast
        vocabulary = getattr(self._head, "out_features", 0)
        has_many = max_tokens * vocabulary > MAX_TRAINING_LOGITS
        self.is_chunked = has_many and may_call_head_alone and _all_return_head_output(model, comm)
        if self.is_chunked:
            self._loss = ChunkedLoss(loss, max(1, MAX_TRAINING_LOGITS // vocabulary))

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, summed over tokens, and their number; see `Loss`.

        Args:
            batch: As `collate_batch` returns it.
        """
        with self._autocast():
            if self.is_chunked:
                hidden, labels = next_token_hidden_states(self._model, batch)
                return self._loss(hidden, self._head, {"labels": labels})
            logits, labels = next_token_outputs(self._model, batch)
            return self._loss(logits, nn.Identity(), {"labels": labels})


def _all_return_head_output(model: nn.Module, comm: Communicator) -> bool:
    """Whether the model returns its head's output on all ranks; logs it if not. Collective."""
    unchanged = all(comm.gather(returns_head_output(model, comm.device)))
    if not unchanged and comm.is_main:
        logger.warning(
            "%s changes the output of its head: all logits of a batch are in memory at once",
            type(base_model(model)).__name__,
        )
    return unchanged


class ChunkedLoss:
    """Implements `Loss` by calling `loss` on chunks of at most `chunk_tokens` tokens.

    So the logits never exist all at once: the output head runs on a chunk at a time, and again in
    the backward pass. With a vocabulary of 128,256, 2,048 tokens have 1 GiB of fp32 logits, as much
    again for their gradient, and half of that in 16 bits: more than the whole optimizer of a 70B
    model.
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
