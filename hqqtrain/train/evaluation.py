"""Perplexity, and the KL divergence to the full-precision model, over held-out text.

Both models see a batch at the same time and their logits are compared in slices, so neither
a set's nor a long sequence's logits are ever held in fp32.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqtrain.data import Sequences, collate
from hqqtrain.dist import Processes

SLICE = 2048
"""Tokens whose logits are held in fp32 at a time: 1 GiB for a vocabulary of 128 k."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """Figures over `tokens` predicted tokens; `kl` in nats, None without a reference."""

    perplexity: float
    tokens: int
    kl: float | None = None
    reference_perplexity: float | None = None

    @property
    def loss(self) -> float:
        """Mean next-token loss, nats."""
        return math.log(self.perplexity)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    sequences: Sequences,
    processes: Processes,
    *,
    batch_size: int,
    reference: nn.Module | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> Measured:
    """Measures `model` on `sequences`, shared out over the ranks. Collective.

    Args:
        reference: the full-precision model; adds its perplexity and KL(reference || model).
        on_batch: told the number of tokens after every batch of this rank.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    for batch, weight in _batches_of_this_rank(sequences, batch_size, processes):
        part = _sums(model, reference, batch)
        sums += weight * part
        on_batch(int(part[3]))
    model.train(was_training)
    loss, reference_loss, kl, tokens = processes.sum(sums.tolist())
    if reference is None:
        return Measured(_exp(loss / tokens), int(tokens))
    return Measured(_exp(loss / tokens), int(tokens), kl / tokens, _exp(reference_loss / tokens))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _batches_of_this_rank(
    sequences: Sequences, size: int, processes: Processes
) -> Iterator[tuple[Batch, int]]:
    """(batch, weight): as many on every rank, for a sharded forward is a collective.

    A rank that runs out repeats the first batch with weight 0.
    """
    count = -(-len(sequences) // size)
    for turn in range(-(-count // processes.size)):
        index = turn * processes.size + processes.rank
        start = index * size if index < count else 0
        rows = [sequences[i] for i in range(start, min(start + size, len(sequences)))]
        batch = {k: v.to(processes.device) for k, v in collate(rows).items()}
        yield batch, int(index < count)


def _sums(model: nn.Module, reference: nn.Module | None, batch: Batch) -> Tensor:
    """float64 [loss, reference loss, KL, tokens], summed over the batch."""
    labels = batch.pop("labels")[:, 1:].flatten()
    kept = labels != -100
    logits = next_token_logits(model, batch)[kept]
    reference_logits = next_token_logits(reference, batch)[kept] if reference else None
    labels = labels[kept]
    total = torch.zeros(4, dtype=torch.float64, device=labels.device)
    for at in range(0, len(labels), SLICE):
        part = slice(at, at + SLICE)
        log_q = F.log_softmax(logits[part].float(), dim=-1)
        total[0] += F.nll_loss(log_q, labels[part], reduction="sum")
        if reference_logits is not None:
            log_p = F.log_softmax(reference_logits[part].float(), dim=-1)
            total[1] += F.nll_loss(log_p, labels[part], reduction="sum")
            total[2] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    total[3] = len(labels)
    return total


def next_token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[tokens, vocabulary]: position t predicts token t + 1; the last position is left out."""
    return model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
