"""The next-token loss, without ever holding all logits.

A vocabulary of 128,256 makes 2,048 tokens into 1 GiB of fp32 logits, as much again for their
gradient, and half of that in 16 bits: more than a 70B model's whole optimizer. So the head works on
some tokens at a time, and again in the backward pass.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqqtrain.dist import Processes
from hqqtrain.models import TRAINED_LOGITS, base_model
from hqqtrain.train.evaluation import Batch, next_token_logits

logger = logging.getLogger(__name__)

LOGITS = TRAINED_LOGITS
"""Of one part, about 200 MB with their gradients."""

TRIED_TOKENS = 8


class NextTokenLoss:
    """The sum over a batch's tokens, for `model`, which may be wrapped or sharded. Collective.

    Whether it is taken in parts depends on `tokens`, the most that a batch has, and not on a batch:
    ranks have batches of different lengths and must all do the same. Parts are taken only from a
    model that does nothing to what its head gives (some cap it): that is tried, here and once.

    `may_take_parts`: the head may be called by itself, as often as a rank likes.
    """

    def __init__(
        self, model: nn.Module, tokens: int, processes: Processes, may_take_parts: bool = True
    ) -> None:
        self._model = model
        self._head: nn.Module | None = base_model(model).get_output_embeddings()
        self._vocabulary = getattr(self._head, "out_features", 0)
        many = tokens * self._vocabulary > LOGITS
        self._takes_parts = may_take_parts and many and self._is_plain(processes)

    def __call__(self, batch: Batch) -> Tensor:
        """`batch`: as `collate` makes it, with `labels` [n, tokens], -100 where none is wanted."""
        labels = batch["labels"][:, 1:].flatten()
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if not self._takes_parts:
            return _loss(next_token_logits(self._model, inputs), labels)
        step = max(1, LOGITS // self._vocabulary)
        parts = zip(self._hidden(inputs).split(step), labels.split(step), strict=True)
        return torch.stack([self._part(hidden, wanted) for hidden, wanted in parts]).sum()

    def _hidden(self, inputs: Batch) -> Tensor:
        """What the head would be given [tokens, hidden_size]."""
        with self._head_replaced_by(lambda hidden: hidden):
            return next_token_logits(self._model, inputs)

    def _part(self, hidden: Tensor, labels: Tensor) -> Tensor:
        def loss(hidden: Tensor) -> Tensor:
            return _loss(self._head(hidden), labels)  # type: ignore[misc]

        return checkpoint(loss, hidden, use_reentrant=False)

    def _is_plain(self, processes: Processes) -> bool:
        plain = sum(processes.gather(self._passes_logits_on(processes.device))) == processes.size
        if not plain and processes.is_main:
            logger.warning(
                "%s changes what its head gives: all logits of a batch are held at once",
                type(base_model(self._model)).__name__,
            )
        return plain

    @torch.no_grad()
    def _passes_logits_on(self, device: torch.device) -> bool:
        """Whether what the head gives, here something large, comes back bit for bit."""
        given: list[Tensor] = []

        def head(hidden: Tensor) -> Tensor:
            given.append(hidden * 1e4)
            return given[-1]

        tokens = torch.arange(TRIED_TOKENS, device=device)[None] % self._vocabulary
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
