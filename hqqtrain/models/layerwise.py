"""Run a causal language model one decoder layer at a time.

Calibration and the streamed reference need the outputs of every decoder layer on many batches, with
the weights of one layer in memory. The code around the layers (embeddings, masks, rotary tables,
the final norm, the head) differs between the families of models, so it is not written again here.
The model itself runs instead, with decoder layers that only record how they are called, or that
return hidden states which were computed before:

    layerwise = LayerwiseModel(model)
    hidden, calls = layerwise.start(inputs)
    for layer, call in zip(layerwise.layers, calls):
        hidden = layerwise.run_layer(layer, hidden, call)
    logits = layerwise.finish(inputs, hidden)

This gives the outputs of the model if its code hands hidden states unchanged from one decoder layer
to the next, and nothing else. `probe_layerwise` tests it with a small copy of the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from hqqtrain.common.errors import UserError, describe_error
from hqqtrain.models.families.structure import decoder_layers, input_embeddings
from hqqtrain.models.fqn import strip_wrappers
from hqqtrain.models.small_copy import VOCABULARY, small_copies

TOLERANCE = 1e-4
"""Largest difference between equal logits, as a share of their standard deviation."""


@dataclass(frozen=True)
class LayerCall:
    """The arguments with which a model calls a decoder layer, without the hidden states.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Arguments by name, such as the mask of this layer.
        hidden_name: Name of the argument with the hidden states; None if it is the first
            positional one.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None = None

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, "LayerCall"]:
        """Return (hidden states, call) of the arguments of a decoder layer."""
        if args:
            return args[0], cls(args[1:], kwargs)
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        others = {key: value for key, value in kwargs.items() if key != name}
        return kwargs[name], cls((), others, name)


class LayerwiseError(Exception):
    """The model cannot run layer by layer; the message says what it does instead."""


class LayerwiseModel:
    """A causal language model whose decoder layers the caller runs.

    The model must be in evaluation mode. Only the parameters outside of the decoder layers need
    values in `start` and `finish`; `run_layer` needs those of its layer alone. No gradients are
    computed.

    Args:
        model: The model, which may be wrapped, adapted or quantized.

    Attributes:
        layers: The decoder layers, in the order of the model.
        names: Fully qualified names of the decoder layers, as in a checkpoint.
        tuple_size: Number of the outputs of a layer, if they are a tuple that begins with the
            hidden states; None if they are the hidden states alone. `run_layer` finds it out.

    Raises:
        UserError: The model has no list of decoder layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        stack = decoder_layers(model)
        self.layers: list[nn.Module] = list(stack)
        prefix = next(name for name, module in model.named_modules() if module is stack)
        self.names = [strip_wrappers(f"{prefix}.{name}") for name, _ in stack.named_children()]
        self.tuple_size: int | None = None

    @torch.no_grad()
    def start(self, inputs: Mapping[str, Any]) -> tuple[Tensor, list[LayerCall]]:
        """Return the hidden states before the first decoder layer, and the call of every layer.

        Args:
            inputs: Arguments of the model, such as `input_ids` [sequences, tokens].

        Returns:
            The hidden states, [sequences, tokens, hidden_size] in most models, and one call for
            each decoder layer. The calls of different layers share tensors.

        Raises:
            LayerwiseError: The model calls its decoder layers in another way than one after the
                other.
        """
        first_error: LayerwiseError | None = None
        for size in dict.fromkeys((self.tuple_size, None, 1, 2, 3)):
            self.tuple_size = size
            try:
                return self._record(inputs)
            except LayerwiseError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    @torch.no_grad()
    def run_layer(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        """Return the hidden states after `layer`.

        Args:
            layer: A decoder layer with weights: one of `layers`, or another one of its class.
            hidden: The hidden states before it.
            call: The call of this layer from `start`, for the same batch.
        """
        if call.hidden_name is None:
            outputs = layer(hidden, *call.args, **call.kwargs)
        else:
            outputs = layer(**{call.hidden_name: hidden}, **call.kwargs)
        self.tuple_size = None if isinstance(outputs, Tensor) else len(outputs)
        return outputs if self.tuple_size is None else outputs[0]

    @torch.no_grad()
    def finish(self, inputs: Mapping[str, Any], hidden: Tensor) -> Tensor:
        """Return the logits [sequences, tokens, vocabulary].

        Args:
            inputs: The arguments of the model that `start` was called with.
            hidden: The hidden states after the last decoder layer.
        """
        outputs = self._outputs(hidden)
        with _replaced_forwards(self.layers, lambda index, args, kwargs: outputs):
            return self._model(**inputs, use_cache=False).logits

    def _outputs(self, hidden: Tensor) -> Any:
        """Return what a decoder layer returns; all outputs but the hidden states are None."""
        return hidden if self.tuple_size is None else (hidden, *[None] * (self.tuple_size - 1))

    def _record(self, inputs: Mapping[str, Any]) -> tuple[Tensor, list[LayerCall]]:
        """Call the model with decoder layers that record their calls and return their input."""
        calls: list[LayerCall] = []
        states: list[Any] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, call = LayerCall.split(args, kwargs)
            if index != len(calls):
                raise LayerwiseError("calls its decoder layers in another order, or several times")
            if not isinstance(hidden, Tensor) or (states and hidden is not states[0]):
                raise LayerwiseError("changes the hidden states between its decoder layers")
            states.append(hidden)
            calls.append(call)
            if len(calls) == len(self.layers):
                raise _StopForward
            return self._outputs(hidden)

        try:
            with _replaced_forwards(self.layers, record):
                self._model(**inputs, use_cache=False)
        except _StopForward:
            return states[0], calls
        except LayerwiseError:
            raise
        except Exception as error:
            if not calls:  # an error of the model, which has nothing to do with its layers
                raise
            raise LayerwiseError(f"fails between its layers ({describe_error(error)})") from error
        raise LayerwiseError(f"calls {len(calls)} of its {len(self.layers)} decoder layers")


class _StopForward(Exception):
    """All decoder layers were called, so the rest of the forward pass is not needed."""


@contextmanager
def _replaced_forwards(
    layers: list[nn.Module], function: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Let each layer call `function(index, args, kwargs)` in place of its `forward`.

    The layers stay in the model, because the code of many models reads attributes of them.
    """
    own = [vars(layer).get("forward") for layer in layers]  # other libraries replace it, too
    try:
        for index, layer in enumerate(layers):
            layer.forward = lambda *args, _index=index, **kwargs: function(_index, args, kwargs)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


@torch.no_grad()
def probe_layerwise(hf_config: PretrainedConfig, model: nn.Module) -> str:
    """Test with a small copy whether a model gives the same logits layer by layer.

    Args:
        hf_config: The configuration of the model.
        model: The model, which may be on the meta device.

    Returns:
        Why the model cannot run layer by layer, as the rest of a sentence that begins with the
        model; empty if it can.
    """
    generator = torch.Generator().manual_seed(0)
    reason = "has no small copy that could be tested"
    for small in small_copies(hf_config, model):
        embeddings = input_embeddings(small)
        size = getattr(embeddings, "num_embeddings", VOCABULARY)
        tokens = torch.randint(size // 4, size, (2, 13), generator=generator)
        try:
            expected = small(input_ids=tokens, use_cache=False).logits.float()
        except Exception as error:  # any error of the model's code, at these widths
            reason = f"could not be tested ({describe_error(error)})"
            continue
        try:
            logits = _layerwise_logits(small, tokens).float()
        except (LayerwiseError, UserError) as error:
            return str(error)
        except Exception as error:
            return f"fails layer by layer ({describe_error(error)})"
        difference = (logits - expected).abs().max()
        if logits.shape == expected.shape and difference <= TOLERANCE * expected.std():
            return ""
        return "computes other logits layer by layer, so more than hidden states passes its layers"
    return reason


def _layerwise_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of `tokens`, layer by layer, each layer for all sequences in turn."""
    layerwise, rows = LayerwiseModel(model), [{"input_ids": row[None]} for row in tokens]
    started = [layerwise.start(inputs) for inputs in rows]
    states = [hidden for hidden, _ in started]
    for index, layer in enumerate(layerwise.layers):
        for row, (_, calls) in enumerate(started):
            states[row] = layerwise.run_layer(layer, states[row], calls[index])
    return torch.cat([layerwise.finish(*pair) for pair in zip(rows, states, strict=True)])
