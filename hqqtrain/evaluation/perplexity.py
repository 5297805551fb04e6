"""Measure perplexity, and the distance to the full-precision model, on a held-out set.

Both models run on the same batch, and their logits are compared in slices. So only the logits of a
slice ever exist in fp32.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hqqtrain.data.layout import PACKED, Batch, BatchLayout, batch_on_device
from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.causal_lm import MAX_EVALUATION_TOKENS, next_token_outputs


@dataclass(frozen=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        perplexity: exp of the mean next-token loss; infinite if that overflows.
        tokens: Number of predicted tokens.
        kl: KL(reference || model) in nats per token; None without a reference.
        reference_perplexity: Perplexity of the reference model; None without one.
        top1_agreement: Share of the tokens for which the model and the reference have the same most
            likely next token, from 0 to 1; None without a reference.
    """

    perplexity: float
    tokens: int
    kl: float | None = None
    reference_perplexity: float | None = None
    top1_agreement: float | None = None

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
    layout: BatchLayout = PACKED,
    counts_first: bool = False,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> EvalResult:
    """Measure `model` on `sequences`, distributed over the ranks. Collective.

    Args:
        model: Causal language model, sharded or not.
        sequences: The tokenized held-out set, the same on all ranks.
        comm: All ranks of the run.
        batch_size: Sequences per batch and rank.
        reference: The full-precision model; adds its perplexity, KL(reference || model) and
            the top-1 agreement.
        layout: Which sequences may share a batch.
        counts_first: Whether the mean loss of a sequence counts for all of its targets, with the
            first token, which is not predicted. The scripts of GPTQ and hqq take the mean so.
        on_batch: Called after every batch of this rank, with the number of tokens that all ranks
            have predicted meanwhile. It does not depend on the rank.

    Returns:
        The result over the whole set, the same on all ranks.
    """
    was_training = model.training
    model.eval()
    # The sum of `_sum_over_tokens` over all batches of this rank.
    sums = torch.zeros(5, dtype=torch.float64, device=comm.device)
    batches = batches_of_this_rank(sequences, batch_size, comm, layout, counts_first=counts_first)
    for batch, weight, tokens_of_ranks in batches:
        sums += weight * _sum_over_tokens(model, reference, batch)
        on_batch(tokens_of_ranks)
    model.train(was_training)
    loss, reference_loss, kl, agreeing, tokens = comm.all_reduce_sum(sums)
    perplexity = _perplexity(loss / tokens)
    count = sequences.target_token_count
    if reference is None:
        return EvalResult(perplexity, count)
    reference_perplexity = _perplexity(reference_loss / tokens)
    return EvalResult(perplexity, count, kl / tokens, reference_perplexity, agreeing / tokens)


def _perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if a float would overflow."""
    return math.exp(loss) if loss < 700 else math.inf  # the largest float is about exp(709)


def _weighted(
    sequences: TokenSequences, counts_first: bool
) -> Iterator[tuple[TokenSequences, float]]:
    """Yield the sequences that have the same weight, and the weight of their tokens in the mean.

    It is 1, unless `counts_first`: then it is the number of the targets of a sequence over that of
    its predicted tokens, which differ if its first token is a target.
    """
    if not counts_first:
        yield sequences, 1.0
        return
    predicted = sequences.target_counts
    weights = (predicted + sequences.targets[sequences.begin]) / predicted
    for weight in np.unique(weights):
        yield sequences.select(np.flatnonzero(weights == weight)), float(weight)


def batches_of_this_rank(
    sequences: TokenSequences,
    batch_size: int,
    comm: Communicator,
    layout: BatchLayout,
    *,
    counts_first: bool = False,
) -> Iterator[tuple[Batch, float, int]]:
    """Yield (batch, weight, targets of all ranks), the same number of times on every rank.

    The forward pass of a sharded model is a collective, so a rank without a batch must run it, too.
    It repeats the first batch, with weight 0. The arguments are those of `evaluate_perplexity`.
    """
    batches = [
        (batch, weight)
        for group, weight in _weighted(sequences, counts_first)
        for batch in layout.evaluation_batches(group, batch_size)
    ]
    for turn in range(ceil(len(batches) / comm.size)):
        index = turn * comm.size + comm.rank  # round robin
        exists = index < len(batches)
        chosen, weight = batches[index if exists else 0]
        on_device = batch_on_device(chosen, layout, comm.device)
        of_ranks = batches[turn * comm.size : (turn + 1) * comm.size]
        tokens = sum(each.target_token_count for each, _ in of_ranks)
        yield on_device, weight if exists else 0.0, tokens


def _sum_over_tokens(model: nn.Module, reference: nn.Module | None, batch: Batch) -> Tensor:
    """Return float64 [5], summed over the batch.

    These are the loss, the loss of the reference, KL, the number of tokens for which both have the
    same most likely next token, and the number of tokens.
    """
    logits, labels = next_token_outputs(model, batch)
    reference_logits = next_token_outputs(reference, batch)[0] if reference else None
    is_target = labels != IGNORE_INDEX
    if not is_target.all():  # there is padding; otherwise the copies are saved
        logits, labels = logits[is_target], labels[is_target]
        reference_logits = None if reference_logits is None else reference_logits[is_target]
    sums = torch.zeros(5, dtype=torch.float64, device=labels.device)
    for start in range(0, len(labels), MAX_EVALUATION_TOKENS):
        tokens = slice(start, start + MAX_EVALUATION_TOKENS)
        log_q = F.log_softmax(logits[tokens].float(), dim=-1)
        sums[0] += F.nll_loss(log_q, labels[tokens], reduction="sum")
        if reference_logits is not None:
            log_p = F.log_softmax(reference_logits[tokens].float(), dim=-1)
            sums[1] += F.nll_loss(log_p, labels[tokens], reduction="sum")
            sums[2] += _sum_kl(log_p, log_q)
            sums[3] += (logits[tokens].argmax(-1) == reference_logits[tokens].argmax(-1)).sum()
    sums[4] = len(labels)
    return sums


def _sum_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum of p (log p - log q), with the bits of `F.kl_div`, and overwrite both.

    `F.kl_div` allocates three tensors of this size, which takes most of its time on a CPU.
    """
    difference = torch.sub(log_p, log_q, out=log_q)
    return difference.mul_(log_p.exp_()).sum()
