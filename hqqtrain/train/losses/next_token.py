"""The next-token loss, computed in chunks so that the logits never exist all at once.

With a vocabulary of 128,256, 2,048 tokens have 1 GiB of fp32 logits, as much again for their
gradient, and half of that in 16 bits: more than the whole optimizer of a 70B model. So the output
head runs on a chunk of tokens at a time, and again in the backward pass.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.perplexity import Batch, next_token_logits
from hqqtrain.loading.memory_estimate import TRAINED_LOGITS
from hqqtrain.models.fqn import base_model

logger = logging.getLogger(__name__)

CHUNK_LOGITS = TRAINED_LOGITS
"""Logits of one chunk, about 200 MB with their gradients."""

PROBE_TOKENS = 8
"""Tokens of the forward pass that tests whether the model changes its logits."""


class NextTokenLoss:
    """Sum of the next-token loss over a batch's tokens.

    The decision to use chunks depends on `tokens` and not on the batch, because ranks have batches
    of different lengths and must all do the same. Chunks require that the model does not change its
    head's output (some models cap it); the constructor tests this with one forward pass.

    Args:
        model: May be wrapped or sharded. Creating and calling the loss are collectives.
        tokens: Largest number of tokens in a batch.
        processes: All ranks of the run.
        may_take_parts: The head may be called by itself, a different number of times on each rank.
    """

    def __init__(
        self, model: nn.Module, tokens: int, comm: Communicator, allow_chunks: bool = True
    ) -> None:
        self._model = model
        self._head: nn.Module | None = base_model(model).get_output_embeddings()
        self._vocabulary = getattr(self._head, "out_features", 0)
        many = tokens * self._vocabulary > CHUNK_LOGITS
        self._takes_parts = allow_chunks and many and self._is_plain(comm)

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss, summed over the tokens whose label is not -100, in nats. Collective.

        Args:
            batch: As `collate` returns it, with `labels` [n, tokens].
        """
        labels = batch["labels"][:, 1:].flatten()
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if not self._takes_parts:
            return _loss(next_token_logits(self._model, inputs), labels)
        step = max(1, CHUNK_LOGITS // self._vocabulary)
        parts = zip(self._hidden(inputs).split(step), labels.split(step), strict=True)
        return torch.stack([self._part(hidden, target) for hidden, target in parts]).sum()

    def _hidden(self, inputs: Batch) -> Tensor:
        """Return the input of the head, [tokens, hidden_size]."""
        with self._head_replaced_by(lambda hidden: hidden):
            return next_token_logits(self._model, inputs)

    def _part(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one chunk, whose logits the backward pass computes again."""

        def loss(hidden: Tensor) -> Tensor:
            return _loss(self._head(hidden), labels)  # type: ignore[misc]

        return checkpoint(loss, hidden, use_reentrant=False)

    def _is_plain(self, comm: Communicator) -> bool:
        plain = sum(comm.gather(self._passes_logits_on(comm.device))) == comm.size
        if not plain and comm.is_main:
            logger.warning(
                "%s changes the output of its head: all logits of a batch are in memory at once",
                type(base_model(self._model)).__name__,
            )
        return plain

    @torch.no_grad()
    def _passes_logits_on(self, device: torch.device) -> bool:
        """Whether the model returns the head's output bit for bit; large values reveal a cap."""
        given: list[Tensor] = []

        def head(hidden: Tensor) -> Tensor:
            given.append(hidden * 1e4)
            return given[-1]

        tokens = torch.arange(PROBE_TOKENS, device=device)[None] % self._vocabulary
        with self._head_replaced_by(head):
            found = self._model(input_ids=tokens, use_cache=False).logits
        return torch.equal(found.float(), given[-1].float())

    @contextmanager
    def _head_replaced_by(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        assert self._head is not None
        self._head.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._head.forward


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
