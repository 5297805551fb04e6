"""Evaluate the full-precision model with one decoder layer in memory.

All batches of a rank pass through a decoder layer before the next one is read. Of each batch, the
hidden states after the last decoder layer are kept. The logits follow from them whenever another
model is evaluated on the same batch, with the norm and the head, which stay in memory. So the
logits, which need the most memory by far, exist for one batch at a time, and no figure is
approximated.
"""

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from hqqtrain.data.layout import Batch
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.reference import batch_digest
from hqqtrain.loading.streamed_layers import StreamedLayers
from hqqtrain.models.causal_lm import model_inputs, translate_model_errors

HiddenStates = dict[str, Tensor]
"""By the digest of a batch: the hidden states after the last decoder layer, on the host."""


class StreamedReference(nn.Module):
    """A causal language model that can be called for batches whose hidden states are known.

    Args:
        streamed: The model. Its tensors outside of the decoder layers are loaded.
        hidden_states: The hidden states of all batches that will be asked for.
    """

    def __init__(self, streamed: StreamedLayers, hidden_states: HiddenStates) -> None:
        super().__init__()
        self.model = streamed.model
        self._layerwise, self._hidden_states = streamed.layerwise, hidden_states

    def forward(self, *, use_cache: bool = False, **inputs: Tensor) -> SimpleNamespace:
        """Return an object with `logits`, as the model does.

        Raises:
            KeyError: The hidden states of this batch are not known.
        """
        hidden = self._hidden_states[batch_digest(inputs)].to(inputs["input_ids"].device)
        return SimpleNamespace(logits=self._layerwise.finish(inputs, hidden))


def inputs_by_digest(model: nn.Module, batches: Iterable[Batch]) -> dict[str, dict[str, Tensor]]:
    """Return the arguments of `model` for each batch, by their digest."""
    inputs = (model_inputs(model, batch) for batch in batches)
    return {batch_digest(each): each for each in inputs}


@torch.no_grad()
def stream_hidden_states(
    streamed: StreamedLayers,
    inputs: Mapping[str, Mapping[str, Tensor]],
    comm: Communicator,
    on_layer: Callable[[], object] = lambda: None,
) -> HiddenStates:
    """Read the model layer by layer, and return the hidden states of all batches. Collective.

    Args:
        streamed: The model. Its tensors outside of the decoder layers are loaded.
        inputs: The arguments of the model for each batch of this rank, from `inputs_by_digest`.
        comm: All ranks of the run.
        on_layer: Called after each decoder layer. It may raise, which all ranks hear of.

    Raises:
        UserError: A weight has NaN or Inf, or the model's own code has failed.
    """
    layerwise, device = streamed.layerwise, comm.device
    states, calls = HiddenStates(), {}
    with comm.raise_on_all_ranks(), translate_model_errors(streamed.model):
        for key, arguments in inputs.items():
            hidden, calls[key] = layerwise.start(arguments)
            states[key] = hidden.cpu()
    for index in streamed.load_layers():
        layer = layerwise.layers[index]
        with comm.raise_on_all_ranks(), translate_model_errors(streamed.model):
            for key, hidden in states.items():
                after = layerwise.run_layer(layer, hidden.to(device), calls[key][index])
                states[key] = after.cpu()
            on_layer()
    return {key: hidden.contiguous() for key, hidden in states.items()}
