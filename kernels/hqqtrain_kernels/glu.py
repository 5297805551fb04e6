"""The activation of a gated linear unit (GLU), and its gradients: h = act(gate) * up.

`silu` makes it SwiGLU, and `gelu_tanh` GeGLU. Gate and up are the two halves of one tensor, as one
product with both weights writes them. All is computed in fp32 and rounded once.

The backward pass also computes h again, so that a layer need not save it: it reads gate and up for
the gradients anyway.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hqqtrain_kernels import backend

Activation = Literal["silu", "gelu_tanh"]


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """Compute act(gate) * up.

    Args:
        gate_up: gate and up side by side [rows, 2 * features], fp32, bf16 or fp16. Contiguous.
        activation: The activation of the gate.

    Returns:
        h [rows, features], in the dtype of `gate_up`.
    """
    if backend.use_triton(gate_up.device):
        return _triton_kernels().forward(gate_up, activation)
    gate, up = gate_up.float().chunk(2, dim=1)
    return _activate(gate, activation).mul_(up).to(gate_up.dtype)


def gated_activation_backward(
    grad_h: Tensor, gate_up: Tensor, activation: Activation, *, out: Tensor
) -> None:
    """Compute the gradients of gate and up, and h again.

    Args:
        grad_h: The gradient of h [rows, features], which h overwrites. Contiguous.
        gate_up: gate and up side by side [rows, 2 * features]. Contiguous.
        activation: The activation of the gate.
        out: Gets the gradients of gate and up, side by side; it may be `gate_up` itself. All three
            tensors have one dtype.
    """
    if backend.use_triton(gate_up.device):
        _triton_kernels().backward(grad_h, gate_up, activation, out)
        return
    gate, up = gate_up.float().chunk(2, dim=1)
    grad, activated = grad_h.float(), _activate(gate, activation)
    grad_gate = _activate_backward(grad * up, gate, activation)
    grad_up, h = grad * activated, activated.mul_(up)
    grad_h.copy_(h)
    out_gate, out_up = out.chunk(2, dim=1)
    out_gate.copy_(grad_gate)
    out_up.copy_(grad_up)


def _activate(gate: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _activate_backward(grad: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")


class _Kernels(NamedTuple):
    forward: Callable[..., Tensor]
    backward: Callable[..., None]


@functools.cache
def _triton_kernels() -> _Kernels:
    """Import the kernels when a GPU first needs them: Triton does not exist for macOS."""
    from hqqtrain_kernels import glu_triton

    return _Kernels(glu_triton.gated_activation, glu_triton.gated_activation_backward)
