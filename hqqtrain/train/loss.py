"""The next-token loss, without ever holding all logits.

A vocabulary of 128,256 makes 2,048 tokens into 1 GiB of fp32 logits, as much again for their
gradient, and half of that in 16 bits: more than a 70B model's whole optimizer. So the head works on
some tokens at a time, and again in the backward pass.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hqqtrain.models import TRAINED_LOGITS, base_model
from hqqtrain.train.evaluation import Batch, next_token_logits

logger = logging.getLogger(__name__)

LOGITS = TRAINED_LOGITS
"""Of one part, about 200 MB with their gradients."""

TESTED_TOKENS = 8


class NextTokenLoss:
    """The sum over a batch's tokens, for `model`, which may be wrapped or sharded.

    Parts are taken only from a model whose logits are its head's output and no more (some scale or
    cap them): that is tried once, on a few tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head: nn.Module | None = base_model(model).get_output_embeddings()
        self._takes_parts: bool | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """`batch`: as `collate` makes it, with `labels` [n, tokens], -100 where none is wanted."""
        labels = batch["labels"][:, 1:].flatten()
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        vocabulary = getattr(self._head, "out_features", 0)
        if labels.numel() * vocabulary <= LOGITS or not self._may_take_parts(inputs):
            return _loss(next_token_logits(self._model, inputs), labels)
        step = max(1, LOGITS // vocabulary)
        parts = zip(self._hidden(inputs).split(step), labels.split(step), strict=True)
        return torch.stack([self._part(hidden, wanted) for hidden, wanted in parts]).sum()

    def _hidden(self, inputs: Batch) -> Tensor:
        """What the head would be given [tokens, hidden_size]."""
        assert self._head is not None
        with _letting_through(self._head):
            return next_token_logits(self._model, inputs)

    def _part(self, hidden: Tensor, labels: Tensor) -> Tensor:
        def loss(hidden: Tensor) -> Tensor:
            return _loss(self._head(hidden), labels)  # type: ignore[misc]

        return checkpoint(loss, hidden, use_reentrant=False)

    def _may_take_parts(self, inputs: Batch) -> bool:
        if self._takes_parts is None:
            few = {name: value[:, :TESTED_TOKENS] for name, value in inputs.items()}
            self._takes_parts = self._has_plain_logits(few)
            if not self._takes_parts:
                logger.warning(
                    "%s does more to logits than its head: all of them are held at once",
                    type(base_model(self._model)).__name__,
                )
        return self._takes_parts

    @torch.no_grad()
    def _has_plain_logits(self, few: Batch) -> bool:
        assert self._head is not None
        was_training = self._model.training
        self._model.eval()  # no dropout, which would tell the two apart
        expected = next_token_logits(self._model, few).float()
        found = self._head(self._hidden(few)).float()
        self._model.train(was_training)
        return torch.allclose(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


@contextmanager
def _letting_through(head: nn.Module) -> Iterator[None]:
    """`head` gives back what it is given."""
    head.forward = lambda hidden: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
