"""The cross-entropy of the next token."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from hqqtrain.data.sequences import IGNORE_INDEX


class NextTokenLoss:
    """Implements `Loss` for `train.objective=next_token`, in fp32."""

    def __call__(
        self, hidden: Tensor, head: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        logits = head(hidden).float()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (labels != IGNORE_INDEX).sum()
