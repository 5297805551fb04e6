"""A gated MLP with LoRA, down(act(gate(x)) * up(x)), as one autograd function."""

from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hqqtrain.compat import has_hooks, keeps_graph
from hqqtrain.nn.lora_blocks import products
from hqqtrain.nn.lora_blocks.adapted_linear import AdaptedLinear
from hqqtrain.nn.lora_blocks.frozen import (
    FrozenLinears,
    KeptWeight,
)
from hqqtrain.nn.lora_blocks.linears import is_computable
from hqqtrain.nn.recomputation import is_recomputing
from hqqtrain.nn.replacement import replace_attribute
from hqqtrain_kernels.autocast import product_dtype, without_autocast
from hqqtrain_kernels.glu import Activation, gated_activation, gated_activation_backward


class GatedMLPBlock:
    """Computes a gated MLP. A call that the block cannot compute goes to the module's `forward`.

    Args:
        mlp: The MLP, which gets another `forward`.
        gate: Its linear whose output the activation gates.
        up: Its other linear to the inner width.
        down: Its linear back to the residual stream.
        activation: The activation of the gate.
        ends_layer: Whether the decoder layer only adds the output to its residual. The output is
            then not computed again when the layer is recomputed for its backward pass.
        undo: Gives `mlp` its own `forward` again when it is closed; None: it keeps this one.
    """

    def __init__(
        self, mlp: nn.Module, gate: AdaptedLinear, up: AdaptedLinear, down: AdaptedLinear, *,
        activation: Activation, ends_layer: bool, undo: ExitStack | None = None,
    ) -> None:  # fmt: skip
        self._mlp, self._linears = mlp, (gate, up, down)
        self._activation, self._ends_layer = activation, ends_layer
        self._kept = KeptWeight(), KeptWeight()
        replace_attribute(mlp, "forward", partial(self._forward, mlp.forward), undo)

    def _forward(self, plain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., hidden] to [..., hidden]."""
        linears = self._linears
        observed = any(has_hooks(linear.module) for linear in linears)
        if args or kwargs or observed or not is_computable(x, linears):
            return plain(x, *args, **kwargs)
        inner, down = FrozenLinears.of(linears[:2]), FrozenLinears.of(linears[2:])
        settings = _Settings(self._activation, self._kept, self._skips_output())
        A, B = [linear.A for linear in linears], [linear.B for linear in linears]
        x = x.to(product_dtype(x))
        return _GatedMLPFunction.apply(x, inner, down, settings, *A, *B)

    def _skips_output(self) -> bool:
        return self._ends_layer and is_recomputing() and not has_hooks(self._mlp)


class _Settings(NamedTuple):
    """How to compute an MLP."""

    activation: Activation
    kept: tuple[KeptWeight, KeptWeight]
    skips_output: bool


class _GatedMLPFunction(torch.autograd.Function):
    """y [..., K] of a gated MLP; the gradients of x, of all A_i and of all B_i.

    It saves x, U of gate and up, and the outputs of gate and up, but not h, the input of `down`.
    The backward pass computes h again with the gradients of its factors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inner: FrozenLinears, down: FrozenLinears, settings: _Settings,
        *AB: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute y from x [..., K] and the matrices A and B of gate, up and down."""
        with without_autocast(x):
            adapters = products.cast_adapters(AB[:2], AB[3:5], inner.scalings, x.dtype)
            down_adapters = products.cast_adapters(AB[2:3], AB[5:], down.scalings, x.dtype)
            rows = x.reshape(-1, x.shape[-1])
            U = products.project(rows, adapters)
            W = products.dense_weight(inner.weights, x.dtype)
            gate_up = products.joined_outputs(rows, U, W, inner.biases, adapters)
            if is_recomputing():
                settings.kept[0].keep(W)
            del W
            if settings.skips_output:
                y = x.new_empty(len(rows), len(AB[5]))
            else:
                y = _down(gate_up, down, down_adapters, settings)
        ctx.inner, ctx.down = inner.settings(), down.settings()
        ctx.settings, ctx.dtype = settings, AB[0].dtype
        ctx.save_for_backward(
            x, U, gate_up, adapters.A, *adapters.B, down_adapters.A, *down_adapters.B,
            *inner.tensors(), *down.tensors(),
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        """Compute the gradients from that of y [..., K]."""
        x, U, gate_up, A, B_gate, B_up, A_down, B_down, *tensors = ctx.saved_tensors
        saved, settings = iter(tensors), ctx.settings
        weights, down_weights = ctx.inner.take_weights(saved), ctx.down.take_weights(saved)
        with without_autocast(x):
            adapters = products.Adapters(A, (B_gate, B_up), ctx.inner.scalings)
            down_adapters = products.Adapters(A_down, (B_down,), ctx.down.scalings)
            g, rows = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
            V = products.project_gradients([g], down_adapters)
            W = settings.kept[1].take(down_weights, x.dtype)
            h = products.input_gradient([g], V, W, down_adapters)  # for now, the gradient of h
            del W
            # The saved outputs of gate and up are not needed again, unless the graph is kept.
            grads = torch.empty_like(gate_up) if keeps_graph() else gate_up
            gated_activation_backward(h, gate_up, settings.activation, out=grads)
            U_down = products.project(h, down_adapters)
            down_A, down_B = products.adapter_gradients([g], h, U_down, V, down_adapters, ctx.dtype)
            del h
            parts = products.split_outputs(grads, adapters)
            V = products.project_gradients(parts, adapters)
            grad_A, grad_B = products.adapter_gradients(parts, rows, U, V, adapters, ctx.dtype)
            grad_x = None
            if ctx.needs_input_grad[0]:
                W = settings.kept[0].take(weights, x.dtype)
                grad_x = products.input_gradient([grads], V, W, adapters).view(x.shape)
        return grad_x, None, None, None, *grad_A, *down_A, *grad_B, *down_B


def _down(
    gate_up: Tensor, down: FrozenLinears, adapters: products.Adapters, settings: _Settings
) -> Tensor:
    """Compute the output [M, K] from the outputs of gate and up [M, 2 F]."""
    h = gated_activation(gate_up, settings.activation)
    U = products.project(h, adapters)
    W = products.dense_weight(down.weights, h.dtype)
    if is_recomputing():
        settings.kept[1].keep(W)
    (y,) = products.outputs(h, U, W, down.biases, adapters)
    return y
