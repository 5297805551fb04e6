"""Perplexity, and the KL divergence to the full-precision model, on a held-out set.

Both models run on the same batch and their logits are compared in slices. So neither the logits of
the whole set nor those of a long sequence ever exist in fp32.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqtrain.data.loader import Batch, collate_batch
from hqqtrain.data.packing import IGNORE_INDEX, TokenSequences
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.causal_lm import MAX_EVALUATION_TOKENS, next_token_outputs


@dataclass(frozen=True)
class EvalResult:
    """Figures over `tokens` predicted tokens; `kl` in nats per token, None without a reference."""

    perplexity: float
    tokens: int
    kl: float | None = None
    reference_perplexity: float | None = None

    @property
    def loss(self) -> float:
        """Mean next-token loss in nats."""
        return math.log(self.perplexity)


@torch.no_grad()
def evaluate_perplexity(
    model: nn.Module,
    sequences: TokenSequences,
    comm: Communicator,
    *,
    batch_size: int,
    reference: nn.Module | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> EvalResult:
    """Measure `model` on `sequences`, distributed over the ranks. Collective.

    Args:
        model: Causal language model, sharded or not.
        sequences: The tokenized held-out set, the same on all ranks.
        comm: All ranks of the run.
        batch_size: Sequences per batch and rank.
        reference: The full-precision model; adds its perplexity and KL(reference || model).
        on_batch: Called with the number of predicted tokens after every batch of this rank.

    Returns:
        Figures over the whole set, the same on all ranks.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=comm.device)
    for batch, weight in _batches_of_this_rank(sequences, batch_size, comm):
        part = _sums(model, reference, batch)
        sums += weight * part
        on_batch(int(part[3]))
    model.train(was_training)
    loss, reference_loss, kl, tokens = comm.sum(sums)
    perplexity = _perplexity(loss / tokens)
    if reference is None:
        return EvalResult(perplexity, int(tokens))
    return EvalResult(perplexity, int(tokens), kl / tokens, _perplexity(reference_loss / tokens))


def _perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if a float would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def _batches_of_this_rank(
    sequences: TokenSequences, size: int, comm: Communicator
) -> Iterator[tuple[Batch, int]]:
    """Yield (batch, weight), equally many on every rank, because a sharded forward is a collective.

    A rank that runs out of batches repeats the first one with weight 0.
    """
    count = -(-len(sequences) // size)
    for turn in range(-(-count // comm.size)):
        index = turn * comm.size + comm.rank  # round robin
        start = index * size if index < count else 0
        rows = [sequences[i] for i in range(start, min(start + size, len(sequences)))]
        batch = {k: v.to(comm.device) for k, v in collate_batch(rows).items()}
        yield batch, int(index < count)


def _sums(model: nn.Module, reference: nn.Module | None, batch: Batch) -> Tensor:
    """Return float64 [loss, reference loss, KL, tokens], summed over the batch."""
    logits, labels = next_token_outputs(model, batch)
    is_target = labels != IGNORE_INDEX
    logits, labels = logits[is_target], labels[is_target]
    reference_logits = next_token_outputs(reference, batch)[0][is_target] if reference else None
    total = torch.zeros(4, dtype=torch.float64, device=labels.device)
    for start in range(0, len(labels), MAX_EVALUATION_TOKENS):
        part = slice(start, start + MAX_EVALUATION_TOKENS)
        log_q = F.log_softmax(logits[part].float(), dim=-1)
        total[0] += F.nll_loss(log_q, labels[part], reduction="sum")
        if reference_logits is not None:
            log_p = F.log_softmax(reference_logits[part].float(), dim=-1)
            total[1] += F.nll_loss(log_p, labels[part], reduction="sum")
            total[2] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    total[3] = len(labels)
    return total
