"""Get the hidden states that a model passes to its output head, without running the head.

transformers has no public call for this that also runs the hooks of DDP and FSDP on the model. So
the whole model is called while its output head is replaced, by transformers' own
`set_output_embeddings`:

1. Take the head from the model (`get_output_embeddings`); it keeps its parameters and its hooks.
2. Put a module in its place that returns its input.
3. Call the model as usual, wrapped or not. Its `logits` are hidden states.
4. Put the head back. The caller applies it to the hidden states.

The head is called after the forward pass of the model, when its parameters must be unsharded. DDP
and FSDP1 do not shard the head. FSDP2 keeps the parameters of its root module, which include those
of the head, unsharded from the forward to the backward pass. ZeRO-3 frees them, so it cannot use
this module.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.models.causal_lm import next_token_outputs
from hqqtrain.models.families.structure import output_head
from hqqtrain.models.fqn import base_model, original_module

PROBE_TOKENS = 8
"""Number of tokens in the forward pass that tests whether the model changes its logits."""

PROBE_SCALE = 1e4
"""Factor of the hidden states in that test: large values reveal a cap on the logits."""


def next_token_hidden_states(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the head's inputs, [tokens, hidden_size], and the labels of the next tokens, [tokens].

    Args:
        model: Causal language model, which may be wrapped or sharded; see `returns_head_output`.
        batch: As `collate_batch` returns it.
    """
    with _output_head_replaced(model, scale=1):
        return next_token_outputs(model, batch)


@torch.no_grad()
def returns_head_output(model: nn.Module, device: torch.device) -> bool:
    """Whether the model returns the output of its head bit for bit. Collective if it is sharded.

    Some models cap or scale the output of the head. Then head and hidden states alone do not
    determine the loss.
    """
    vocabulary = original_module(output_head(model)).out_features
    tokens = torch.arange(PROBE_TOKENS, device=device)[None] % vocabulary
    with _output_head_replaced(model, scale=PROBE_SCALE) as replacement:
        logits = model(input_ids=tokens, use_cache=False).logits
    head_output = replacement.output
    return head_output is not None and torch.equal(logits.float(), head_output.float())


class _HeadReplacement(nn.Module):
    """Returns its input times `scale`, and takes all other attributes from `head`."""

    def __init__(self, head: nn.Module, scale: float) -> None:
        super().__init__()
        # Not a submodule, so that wrappers do not find the parameters of the head twice.
        self.__dict__["head"] = head
        self.scale = scale
        self.output: Tensor | None = None  # of the last call with a scale other than 1

    def forward(self, hidden: Tensor) -> Tensor:
        if self.scale == 1:
            return hidden
        self.output = hidden * self.scale
        return self.output

    def __getattr__(self, name: str) -> Any:
        # Called only for names that this module does not have itself. Mamba asks for `weight`.
        return getattr(self.__dict__["head"], name)


@contextmanager
def _output_head_replaced(model: nn.Module, scale: float) -> Iterator[_HeadReplacement]:
    """Replace the output head of `model` by a `_HeadReplacement`, which is yielded."""
    base, head = base_model(model), output_head(model)
    replacement = _HeadReplacement(head, scale)
    base.set_output_embeddings(replacement)
    try:
        yield replacement
    finally:
        base.set_output_embeddings(head)
