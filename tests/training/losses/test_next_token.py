"""The next-token loss is PyTorch's cross-entropy, in fp32, over the tokens that have a label."""

import torch
import torch.nn.functional as F
from torch import nn

from hqqtrain.data.sequences import IGNORE_INDEX
from hqqtrain.training.losses.next_token import NextTokenLoss


def test_sum_and_count():
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 11, dtype=torch.bfloat16), torch.randn(6, 8, dtype=torch.bfloat16)
    labels = torch.tensor([3, IGNORE_INDEX, 0, 10, IGNORE_INDEX, 7])
    loss, count = NextTokenLoss()(hidden, head, {"labels": labels})
    kept = labels != IGNORE_INDEX
    logits = head(hidden).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], labels[kept]) * 4)
    assert (int(count), loss.dtype) == (4, torch.float32)


def test_without_a_label_the_loss_is_zero():
    labels = torch.full((3,), IGNORE_INDEX)
    loss, count = NextTokenLoss()(torch.randn(3, 5), nn.Identity(), {"labels": labels})
    assert (float(loss), int(count)) == (0.0, 0)
