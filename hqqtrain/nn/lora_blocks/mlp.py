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
from hqqtrain.nn.lora_blocks.adapter_casts import AdapterCasts
from hqqtrain.nn.lora_blocks.frozen import FrozenLinears, KeptWeight
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
        casts: Casts the adapters of all blocks.
        undo: Gives `mlp` its own `forward` again when it is closed; None: it keeps this one.
    """

    def __init__(
        self, mlp: nn.Module, gate: AdaptedLinear, up: AdaptedLinear, down: AdaptedLinear, *,
        activation: Activation, ends_layer: bool, casts: AdapterCasts,
        undo: ExitStack | None = None,
    ) -> None:  # fmt: skip
        self._casts, self._groups = casts, (casts.add((gate, up)), casts.add((down,)))
        self._mlp, self._linears = mlp, (gate, up, down)
        self._activation, self._ends_layer = activation, ends_layer
        self._kept = KeptWeight(), KeptWeight()
        replace_attribute(mlp, "forward", partial(self._forward, mlp.forward), undo)

    def adds_to(self, residual: Tensor) -> bool:
        """Whether a call may have the argument `residual`, a tensor that is added to the output."""
        down = self._linears[2]
        is_seen = any(map(has_hooks, (self._mlp, down.module)))  # a hook expects the output alone
        return down.bias is None and not is_seen and product_dtype(residual) == residual.dtype

    def _forward(
        self, plain: Any, x: Tensor, *args: Any, residual: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Map x [..., hidden] to [..., hidden], and add `residual` [..., hidden]."""
        linears = self._linears
        observed = any(has_hooks(linear.module) for linear in linears)
        if args or kwargs or observed or not is_computable(x, linears):
            y = plain(x, *args, **kwargs)
            return y if residual is None else residual + y
        inner, down = FrozenLinears.of(linears[:2]), FrozenLinears.of(linears[2:])
        skips_output = self._skips_output(ends_layer=self._ends_layer or residual is not None)
        settings = _Settings(self._activation, self._kept, skips_output)
        A, B = [linear.A for linear in linears], [linear.B for linear in linears]
        x = x.to(product_dtype(x))
        cast = tuple(self._casts.get(group, x.dtype) for group in self._groups)
        return _GatedMLPFunction.apply(x, residual, inner, down, settings, cast, *A, *B)

    def _skips_output(self, *, ends_layer: bool) -> bool:
        return ends_layer and is_recomputing() and not has_hooks(self._mlp)


def adds_residual(mlp: nn.Module, residual: Tensor) -> bool:
    """Whether `mlp` is computed by a block that adds `residual` to its output."""
    block = getattr(getattr(vars(mlp).get("forward"), "func", None), "__self__", None)
    return isinstance(block, GatedMLPBlock) and block.adds_to(residual)


class _Settings(NamedTuple):
    """How to compute an MLP."""

    activation: Activation
    kept: tuple[KeptWeight, KeptWeight]
    skips_output: bool


class _GatedMLPFunction(torch.autograd.Function):
    """y [..., K] of a gated MLP plus a residual; the gradients of both, of all A_i and all B_i.

    It saves x, every U, and the outputs of gate and up, but not h, the input of `down`.
    The backward pass computes h again with the gradients of its factors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, inner: FrozenLinears, down: FrozenLinears,
        settings: _Settings, cast: tuple[products.Adapters | None, ...], *AB: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute y from x [..., K], a residual [..., K] or None, and A and B of gate, up, down.

        `cast` has the adapters of gate and up, and of down, in the dtype of x, if they are cast.
        """
        with without_autocast(x):
            adapters, down_adapters = cast
            if adapters is None:
                adapters = products.cast_adapters(AB[:2], AB[3:5], inner.scalings, x.dtype)
            if down_adapters is None:
                down_adapters = products.cast_adapters(AB[2:3], AB[5:], down.scalings, x.dtype)
            rows = x.reshape(-1, x.shape[-1])
            U = products.project(rows, adapters)
            W = products.dense_weight(inner.weights, x.dtype)
            gate_up = products.joined_outputs(rows, U, W, inner.biases, adapters)
            if is_recomputing():
                settings.kept[0].keep(W)
            del W
            if settings.skips_output and len(rows) > 1:
                y = x.new_empty(len(rows), len(AB[5]))
                U_down = _missing(len(rows), len(down_adapters.A), x)
            else:
                added = None if residual is None else residual.reshape(rows.shape[0], -1)
                y, U_down = _down(gate_up, added, down, down_adapters, settings)
        ctx.has_residual = residual is not None
        ctx.inner, ctx.down = inner.settings(), down.settings()
        ctx.settings, ctx.dtype = settings, AB[0].dtype
        ctx.save_for_backward(
            x, U, gate_up, U_down, adapters.A, *adapters.B, down_adapters.A, *down_adapters.B,
            *inner.tensors(), *down.tensors(),
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        """Compute the gradients from that of y [..., K]."""
        x, U, gate_up, U_down, A, B_gate, B_up, A_down, B_down, *tensors = ctx.saved_tensors
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
            if _is_missing(U_down):
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
        grad_residual = grad_y if ctx.has_residual else None
        return grad_x, grad_residual, None, None, None, None, *grad_A, *down_A, *grad_B, *down_B


def _down(
    gate_up: Tensor, residual: Tensor | None, down: FrozenLinears, adapters: products.Adapters,
    settings: _Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the output [M, K] plus `residual` [M, K], and U, from gate and up [M, 2 F]."""
    h = gated_activation(gate_up, settings.activation)
    U = products.project(h, adapters)
    W = products.dense_weight(down.weights, h.dtype)
    if is_recomputing():
        settings.kept[1].keep(W)
    added = down.biases if residual is None else (residual,)
    (y,) = products.outputs(h, U, W, added, adapters)
    return y, U


def _missing(rows: int, columns: int, x: Tensor) -> Tensor:
    """Return what stands for a tensor that was not computed: its elements share their memory.

    A recomputation must save as many tensors as the forward pass, of the same shapes.
    """
    return x.new_empty(1).expand(rows, columns)


def _is_missing(tensor: Tensor) -> bool:
    return 0 in tensor.stride()
