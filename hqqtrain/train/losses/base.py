"""The interface of losses: a loss sees hidden states and the output head, not the model.

So a loss decides how the logits are computed: all at once, in chunks (`chunked.py`), or in a fused
kernel that never stores them.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


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
            head: Turns hidden states into logits, [tokens, vocabulary]. If `hidden` are logits
                already, it is an identity.
            batch: Tensors of [tokens] or [tokens, ...]. `labels` are the tokens to predict.

        Returns:
            The loss in nats, summed over the tokens whose label is not `IGNORE_INDEX`, and the
            number of these tokens, both scalars.
        """
