"""The interface of losses, and the losses that `train.objective` can name.

A loss gets hidden states and the output head, not the model. So a loss decides how the logits are
computed: all at once, in chunks (`ChunkedLoss`), or in a fused kernel that never stores them. To
add a loss, add a file and a line in `LOSSES`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from hqqtrain.training.losses.linear_cross_entropy import LinearCrossEntropy
from hqqtrain.training.losses.next_token import NextTokenLoss


class Loss(Protocol):
    """A loss over tokens.

    It is a sum, because the trainer divides by the number of tokens of the global batch over all
    ranks.
    """

    def __call__(
        self, hidden: Tensor, head: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of some tokens.

        Args:
            hidden: Inputs of the head, [tokens, hidden_size].
            head: Turns hidden states into logits, [tokens, vocabulary]. It is an identity if
                `hidden` already contains logits.
            batch: Tensors of [tokens] or [tokens, ...]. `labels` are the tokens to predict.

        Returns:
            The loss in nats, summed over the tokens whose label is not `IGNORE_INDEX`, and the
            number of these tokens, both scalars.
        """


LOSSES: dict[str, Callable[[], Loss]] = {"next_token": NextTokenLoss}
"""Constructor of each loss, by `train.objective`."""

FUSED_LOSSES: dict[str, Callable[[], Loss]] = {"next_token": LinearCrossEntropy}
"""Constructor of the same loss for a frozen linear head, if there is one; see `ModelLoss`."""
