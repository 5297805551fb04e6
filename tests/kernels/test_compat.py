"""Each private function of PyTorch still does what the operators need it for.

A failure means that a new release changed it: mend `hqqtrain_kernels/compat.py`. All but
`BelowAutograd` only save time: `ops._can_skip_dispatcher` may return False and every call may then
go through the dispatcher.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hqqtrain_kernels import compat


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_autocast_on_any_device(device: torch.device):
    hint = "compare torch.is_autocast_enabled(device_type) of the device of x"
    assert not compat.is_any_autocast_enabled(), hint
    with torch.autocast(device.type, torch.bfloat16):
        assert compat.is_any_autocast_enabled(), hint
        with torch.autocast(device.type, enabled=False):
            assert not compat.is_any_autocast_enabled(), hint


def test_number_of_dispatch_modes():
    hint = "see torch.utils._python_dispatch, which counts the modes of FakeTensorMode"
    assert compat.dispatch_mode_count() == 0, hint
    with _Mode(), _Mode():
        assert compat.dispatch_mode_count() == 2, hint


def test_tracing_state():
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(compat.get_tracing_state() is not None)
        return x + 1

    function(torch.ones(2))
    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [False, True], "the public function is torch.jit.is_tracing()"


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functorch_transforms(transform):
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(compat.are_functorch_transforms_active())
        return x.sum()

    function(torch.ones(2))
    transform(function)(torch.ones(2, 2))
    assert seen == [False, True], "see torch._functorch.pyfunctorch for the active transforms"


def test_which_arguments_require_a_gradient():
    hint = "the public way is any(t is not None and t.requires_grad for t in tensors)"
    plain, trained = torch.ones(2), torch.ones(2, requires_grad=True)
    assert not compat.any_requires_grad(plain, None), hint
    assert compat.any_requires_grad(plain, None, trained), hint


def test_below_autograd_nothing_is_recorded():
    hint = "an operator must call itself below autograd: see torch.library.register_autograd"
    x = torch.ones(2, requires_grad=True)
    with compat.BelowAutograd():
        assert not torch.mul(x, 2).requires_grad, hint
    assert torch.mul(x, 2).requires_grad, hint
