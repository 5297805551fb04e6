"""Get the hidden states that a model passes to its output head, without running the head.

transformers has no public call for this that also runs the hooks of DDP and FSDP on the model. So
the whole model is called while its output head is replaced, by transformers' own
`set_output_embeddings`:

1. Take the head from the model (`get_output_embeddings`); it keeps its parameters and its hooks.
2. Put a module in its place that returns its input.
3. Call the model as usual, wrapped or not. What it returns as `logits` are hidden states.
4. Put the head back. The caller applies it to the hidden states.

The parameters of the head must be whole after the forward pass of the model. They are under DDP and
FSDP1, which do not shard the head, and under FSDP2, whose root unit stays gathered from its forward
to its backward pass. ZeRO-3 frees them, so it must use whole logits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.models.causal_lm import next_token_outputs
from hqqtrain.models.families.structure import output_head
from hqqtrain.models.fqn import base_model

PROBE_TOKENS = 8
"""Tokens of the forward pass that tests whether the model changes its logits."""

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

    Some models cap or scale it. Their hidden states do not determine their loss.
    """
    vocabulary = output_head(model).out_features
    tokens = torch.arange(PROBE_TOKENS, device=device)[None] % vocabulary
    with _output_head_replaced(model, scale=PROBE_SCALE) as replacement:
        found = model(input_ids=tokens, use_cache=False).logits
    expected = replacement.output
    return expected is not None and torch.equal(found.float(), expected.float())


class _HeadReplacement(nn.Module):
    """Returns its input times `scale`; has all other attributes of `head`, such as `weight`."""

    def __init__(self, head: nn.Module, scale: float) -> None:
        super().__init__()
        self.__dict__["head"] = head  # no submodule, so that wrappers do not find its parameters
        self.scale = scale
        self.output: Tensor | None = None

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
    base, head = base_model(model), output_head(model)
    replacement = _HeadReplacement(head, scale)
    base.set_output_embeddings(replacement)
    try:
        yield replacement
    finally:
        base.set_output_embeddings(head)
