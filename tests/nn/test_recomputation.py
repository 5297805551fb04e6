"""A checkpointed function knows whether it is computed for the first or for the second time."""

import torch
from torch.utils.checkpoint import checkpoint

from hqqtrain.nn.recomputation import checkpoint_contexts, is_recomputing


def test_only_the_second_time_is_a_recomputation() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_recomputing())
        return x.sin().cos()

    x = torch.randn(3, requires_grad=True)
    y = checkpoint(function, x, use_reentrant=False, context_fn=checkpoint_contexts)
    assert not is_recomputing()
    y.sum().backward()
    assert seen == [False, True]
    assert not is_recomputing()  # although PyTorch ends the recomputation with an exception


def test_a_nested_function_is_recomputed_with_the_outer_one() -> None:
    seen = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_recomputing())
        return x.sin().cos()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, x, use_reentrant=False, context_fn=checkpoint_contexts).exp().sin()

    x = torch.randn(3, requires_grad=True)
    checkpoint(outer, x, use_reentrant=False, context_fn=checkpoint_contexts).sum().backward()
    assert seen[0] is False
    assert all(seen[1:])
