"""Run a model on a batch and compute its loss, with the logits all at once or in chunks."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqqtrain.data.layout import Batch
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.causal_lm import MAX_TRAINING_LOGITS, next_token_outputs
from hqqtrain.models.families.structure import output_head
from hqqtrain.models.fqn import base_model, original_module
from hqqtrain.training.losses.hidden_states import (
    next_token_hidden_states,
    returns_head_output,
)
from hqqtrain.training.losses.linear_cross_entropy import is_frozen_linear
from hqqtrain.training.losses.registry import Loss

logger = logging.getLogger(__name__)


class ModelLoss:
    """Computes `loss` on the outputs of `model`, in chunks if a batch has many logits.

    All ranks must decide alike whether to use chunks, but their batches differ in length. So the
    decision depends on `max_tokens` and not on the batch. Chunks require that the model does not
    change the output of its head, which some models cap. The constructor tests this requirement
    with one forward pass.

    Args:
        model: May be wrapped or sharded. Creating and calling a `ModelLoss` are collectives.
        loss: The loss of hidden states or logits.
        fused: The same loss for a frozen linear head, in place of chunks of `loss`; None for none.
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
        fused: Loss | None = None,
        may_call_head_alone: bool = True,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._model, self._loss, self._head = model, loss, output_head(model)
        self._autocast = autocast
        vocabulary = getattr(original_module(self._head), "out_features", 0)
        has_many_logits = max_tokens * vocabulary > MAX_TRAINING_LOGITS
        wants_chunks = has_many_logits and may_call_head_alone
        self.is_chunked = wants_chunks and _all_return_head_output(model, comm)
        if self.is_chunked and fused is not None and is_frozen_linear(self._head):
            self._loss = fused
        elif self.is_chunked:
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
    is_unchanged = all(comm.all_gather_object(returns_head_output(model, comm.device)))
    if not is_unchanged and comm.is_main:
        logger.warning(
            "%s changes the output of its head: all logits of a batch are in memory at once",
            type(base_model(model)).__name__,
        )
    return is_unchanged


class ChunkedLoss:
    """Implements `Loss` by calling `loss` on chunks of at most `chunk_tokens` tokens.

    The output head runs on one chunk at a time, and again in the backward pass. So the logits of a
    batch never exist all at once. With a vocabulary of 128,256, the logits of 2,048 tokens take
    1 GiB in fp32, their gradient 1 GiB more, and the 16-bit logits 0.5 GiB. That is more than the
    optimizer state of the adapters of a 70B model.
    """

    def __init__(self, loss: Loss, chunk_tokens: int) -> None:
        self._loss, self._chunk_tokens = loss, chunk_tokens

    def __call__(
        self, hidden: Tensor, head: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        losses, counts = [], []
        chunks = {name: tensor.split(self._chunk_tokens) for name, tensor in batch.items()}
        for index, hidden_chunk in enumerate(hidden.split(self._chunk_tokens)):
            chunk = {name: tensors[index] for name, tensors in chunks.items()}
            loss, count = checkpoint(self._loss, hidden_chunk, head, chunk, use_reentrant=False)
            losses.append(loss)
            counts.append(count)
        return torch.stack(losses).sum(), torch.stack(counts).sum()
