"""The private functions of PyTorch that the operators call, each under a public name.

Any release of PyTorch may change them without notice; `tests/kernels/test_compat.py` uses each.
They are aliases, because another Python call per operator would cost what they save.
"""

import torch

is_any_autocast_enabled = torch._C._is_any_autocast_enabled
"""Whether autocast is enabled on any device: one call. The public one asks for a device type."""

BelowAutograd = torch._C._AutoDispatchBelowAutograd
"""Context in which the dispatcher skips autograd, as C++'s `at::AutoDispatchBelowAutograd`."""

dispatch_mode_count = torch._C._len_torch_dispatch_stack
"""Return the number of active `TorchDispatchMode`s, such as `FakeTensorMode`."""

get_tracing_state = torch._C._get_tracing_state
"""Return the state of `torch.jit.trace`, or None. The public `torch.jit.is_tracing` is slower."""

are_functorch_transforms_active = torch._C._are_functorch_transforms_active
"""Whether a transform such as `torch.func.grad` or `vmap` is active."""

any_requires_grad = torch._C._any_requires_grad
"""Whether one of the arguments requires a gradient; None counts as no."""
