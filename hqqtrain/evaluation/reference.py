"""Compute the outputs of the full-precision model once for each batch.

The full-precision model never changes, but it is needed at every evaluation, to measure the KL
divergence. Its logits are too large to keep, but they follow from the hidden states that its head
gets, which are smaller by the ratio of vocabulary to hidden size. With them, an evaluation needs
the head alone.
"""

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.models.causal_lm import MAX_KEPT_BYTES
from hqqtrain.models.families.structure import output_head


class ResidentReference(nn.Module):
    """A causal language model that is called only for batches that it has not seen.

    It gives the same bits as the model: the first batch shows whether the model returns the output
    of its head unchanged, and if it does not, the model is called every time.

    Args:
        model: The model.
        head: A head with the weights of the model's head.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model = model
        # In a list it is no submodule: it belongs to the model that is evaluated.
        self._heads = [head]
        self._hidden_states: dict[str, Tensor] = {}
        self._is_verified, self._keeps = False, True

    def forward(self, *, use_cache: bool = False, **inputs: Tensor) -> Any:
        """Return an object with `logits`, as the model does."""
        key = batch_digest(inputs)
        if key in self._hidden_states:
            device = inputs["input_ids"].device
            return SimpleNamespace(logits=self._heads[0](self._hidden_states[key].to(device)))
        hidden_states: list[Tensor] = []
        hook = output_head(self.model).register_forward_pre_hook(
            lambda _, args: hidden_states.extend(args[:1])
        )
        with hook:
            output = self.model(**inputs, use_cache=use_cache)
        if self._keeps:
            self._keep(key, hidden_states, output.logits)
        return output

    def _keep(self, key: str, hidden_states: list[Tensor], logits: Tensor) -> None:
        """Keep the hidden states of a batch, unless the logits do not follow from them."""
        if not self._is_verified:
            self._is_verified = len(hidden_states) == 1 and torch.equal(
                self._heads[0](hidden_states[0]), logits
            )
        kept = sum(states.nbytes for states in self._hidden_states.values())
        if not self._is_verified or kept + hidden_states[0].nbytes > MAX_KEPT_BYTES:
            self._keeps = False
            self._hidden_states.clear()
            return
        self._hidden_states[key] = hidden_states[0].cpu().contiguous()


def batch_digest(inputs: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of the arguments of a call."""
    content = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        tensor = value.detach().cpu().contiguous() if isinstance(value, Tensor) else None
        content.update(repr((name, value if tensor is None else tensor.shape)).encode())
        if tensor is not None:
            content.update(tensor.numpy().tobytes())
    return content.hexdigest()
