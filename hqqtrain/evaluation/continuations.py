"""Continue the beginnings of held-out texts, so that people can read what a model has learned.

A few short texts cost less than an evaluation. The most likely token is always taken, so no random
number is drawn, and a run with samples has the same results as one without.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hqqtrain.data.layout import collate_batch
from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.causal_lm import next_token_outputs

MAX_SECONDS = 20.0
"""After this time no further token is taken, as with parameters that are offloaded to the host."""


def select_beginnings(held_out: TokenSequences, count: int, length: int) -> Tensor:
    """Return the first tokens of held-out texts, int64 [at most `count`, at most `length`].

    The texts are spread evenly over those that are long enough; all have the same length. No two
    have the same first half, because that is what a model continues.
    """
    ends = np.append(held_out.starts[1:], len(held_out.stream))
    lengths = ends - held_out.starts
    length = min(length, int(lengths.max()))
    candidates = held_out.starts[lengths >= length]
    beginnings = held_out.stream[candidates[:, None] + np.arange(length)]
    _, firsts = np.unique(beginnings[:, : (length + 1) // 2], axis=0, return_index=True)
    positions = np.linspace(0, len(firsts) - 1, min(count, len(firsts))).astype(int)
    return torch.from_numpy(beginnings[np.sort(firsts)[positions]].astype(np.int64))


@torch.no_grad()
def continue_greedily(
    model: nn.Module,
    prompts: Tensor,
    comm: Communicator,
    *,
    new_tokens: int,
    on_token: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the most likely continuation of each prompt, token by token. Collective.

    Every rank computes the same tokens, because the forward pass of a sharded model is a
    collective. Those of rank 0 count, because ranks may round differently.

    Args:
        model: Causal language model, sharded or not.
        prompts: int64 [n, length].
        comm: All ranks of the run.
        new_tokens: Tokens per prompt; fewer if they take more than `MAX_SECONDS`.
        on_token: Called after every token of all prompts.

    Returns:
        int64 [n, tokens], on the CPU.
    """
    was_training = model.training
    model.eval()
    tokens, started = prompts.to(comm.device), time.monotonic()
    for _ in range(new_tokens):
        # The last row is rank 0's wish to stop, so that all ranks take the same number of tokens.
        next_tokens = torch.empty(len(tokens) + 1, dtype=torch.int64, device=comm.device)
        next_tokens[:-1] = _most_likely(model, tokens)
        next_tokens[-1] = time.monotonic() - started > MAX_SECONDS
        comm.broadcast(next_tokens, 0)
        tokens = torch.cat([tokens, next_tokens[:-1, None]], dim=1)
        on_token()
        if next_tokens[-1]:
            break
    model.train(was_training)
    return tokens[:, prompts.shape[1] :].cpu()


def _most_likely(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the most likely next token of each row of `tokens`, int64 [n]."""
    # `next_token_outputs` drops the output at the last position, so add one that has no influence.
    rows = torch.cat([tokens, tokens[:, -1:]], dim=1).cpu()
    labels = torch.full((rows.shape[1],), IGNORE_INDEX)
    # Each row is one text without padding, for which every model counts the positions itself.
    batch = collate_batch(
        ({"input_ids": row, "labels": labels} for row in rows), has_positions=False
    )
    on_device = {name: tensor.to(tokens.device) for name, tensor in batch.items()}
    logits, _ = next_token_outputs(model, on_device)
    return logits.unflatten(0, (len(tokens), -1))[:, -1].argmax(dim=-1)
