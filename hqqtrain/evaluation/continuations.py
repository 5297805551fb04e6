"""Continue the beginnings of held-out texts, so that people can read what a model has learned.

A few short texts cost less than an evaluation. The most likely token is always taken, so no random
number is drawn, and a run with samples has the same results as one without.
"""

import time
from collections.abc import Callable, Sequence

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


def select_prompts(
    held_out: TokenSequences, count: int, max_tokens: int, new_tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """Return prompts of held-out chats, and the answers that follow them, each int64 [length].

    A prompt is a chat up to its last answer, so it ends with the header of the assistant, as the
    prompt of a template does. The answer begins with the last tokens of the chat that are trained.

    Args:
        held_out: The held-out examples.
        count: Largest number of prompts; fewer if the chats are long.
        max_tokens: Largest number of tokens of a batch with all prompts and their continuations.
        new_tokens: Tokens of a continuation.
    """
    ends = np.append(held_out.starts[1:], len(held_out.stream))
    found: dict[bytes, tuple[Tensor, Tensor]] = {}  # no prompt twice
    for start, end in zip(held_out.starts.tolist(), ends.tolist(), strict=True):
        trained = np.flatnonzero(held_out.targets[start:end])
        if not len(trained) or trained[0] <= 1:
            continue
        stop = int(trained[-1]) + 1
        gaps = np.flatnonzero(np.diff(trained) > 1)
        begin = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
        tokens = held_out.stream[start:end].astype(np.int64)
        prompt, answer = tokens[:begin], tokens[begin:stop]
        found.setdefault(prompt.tobytes(), (torch.from_numpy(prompt), torch.from_numpy(answer)))
    for number in range(count, 0, -1):
        fitting = [
            pair for pair in found.values() if len(pair[0]) + new_tokens <= max_tokens // number
        ]
        if len(fitting) >= number:
            positions = np.linspace(0, len(fitting) - 1, number).astype(int)
            return [fitting[position] for position in positions]
    return []


@torch.no_grad()
def continue_greedily(
    model: nn.Module,
    prompts: Sequence[Tensor] | Tensor,
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
        prompts: n prompts, each int64 [length].
        comm: All ranks of the run.
        new_tokens: Tokens per prompt; fewer if they take more than `MAX_SECONDS`.
        on_token: Called after every token of all prompts.

    Returns:
        int64 [n, tokens], on the CPU.
    """
    was_training = model.training
    model.eval()
    texts, started = [prompt.to(comm.device) for prompt in prompts], time.monotonic()
    taken: list[Tensor] = []
    for _ in range(new_tokens):
        # The last number is rank 0's request to stop: all ranks take the same number of tokens.
        next_tokens = torch.empty(len(texts) + 1, dtype=torch.int64, device=comm.device)
        next_tokens[:-1] = _most_likely(model, texts)
        next_tokens[-1] = time.monotonic() - started > MAX_SECONDS
        comm.broadcast(next_tokens, 0)
        taken.append(next_tokens[:-1])
        texts = [torch.cat(pair) for pair in zip(texts, next_tokens[:-1, None], strict=True)]
        on_token()
        if next_tokens[-1]:
            break
    model.train(was_training)
    return torch.stack(taken, dim=1).cpu()


def _most_likely(model: nn.Module, texts: Sequence[Tensor]) -> Tensor:
    """Return the most likely next token of each text, int64 [n]."""
    # `next_token_outputs` drops the output at the last position, so add one that has no influence.
    rows = [torch.cat([text, text[-1:]]).cpu() for text in texts]
    # Every model counts the positions itself. No token sees the padding on the right of its text.
    batch = collate_batch(
        ({"input_ids": row, "labels": torch.full_like(row, IGNORE_INDEX)} for row in rows),
        has_positions=False,
    )
    on_device = {name: tensor.to(texts[0].device) for name, tensor in batch.items()}
    logits, _ = next_token_outputs(model, on_device)
    last = [len(text) - 1 for text in texts]
    return logits.unflatten(0, (len(texts), -1))[range(len(texts)), last].argmax(dim=-1)
