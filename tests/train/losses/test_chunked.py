"""A chunked loss splits every tensor of the batch alike and adds up sums and counts."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hqqtrain.train.losses.chunked import ChunkedLoss


class Distance:
    """A loss with a target of its own, which notes the size of each call."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(
        self, hidden: Tensor, head: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(hidden))
        loss = (head(hidden) - batch["teacher"]).square().sum()
        return loss, (batch["labels"] >= 0).sum()


def test_any_loss_and_its_gradient():
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 5), torch.randn(10, 8, requires_grad=True)
    batch = {"labels": torch.arange(10) - 3, "teacher": torch.randn(10, 5)}
    whole, count = Distance()(hidden, head, batch)
    loss = Distance()
    found, found_count = ChunkedLoss(loss, 4)(hidden, head, batch)
    assert loss.sizes == [4, 4, 2]
    torch.testing.assert_close(found, whole)
    assert int(found_count) == int(count) == 7
    ours = torch.autograd.grad(found, [hidden, head.weight])
    for mine, theirs in zip(ours, torch.autograd.grad(whole, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert loss.sizes[3:] == [2, 4, 4]  # computed again in the backward pass
