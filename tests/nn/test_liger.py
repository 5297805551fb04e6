"""The kernel of liger-kernel computes what PyTorch computes."""

import pytest
import torch
import torch.nn.functional as F

from hqqtrain.nn import liger

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
pytestmark = pytest.mark.skipif(not liger.has_liger(), reason="needs liger-kernel")


def test_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 300, device=DEVICE), torch.randint(0, 300, (9,), device=DEVICE)
    labels[::5] = IGNORED
    expected = logits.clone().requires_grad_()
    losses = F.cross_entropy(expected, labels, ignore_index=IGNORED, reduction="none")
    found = liger.cross_entropy_(logits, labels, IGNORED)
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(logits, torch.autograd.grad(losses.sum(), expected)[0])


def test_cross_entropy_of_no_rows():
    nothing = torch.empty(0, 300, device=DEVICE)
    labels = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert liger.cross_entropy_(nothing, labels, IGNORED).shape == (0,)
