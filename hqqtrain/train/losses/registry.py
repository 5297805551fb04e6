"""The losses that `train.objective` can name. To add one, add a file and a line here."""

from collections.abc import Callable

from hqqtrain.train.losses.base import Loss
from hqqtrain.train.losses.next_token import NextTokenLoss

LOSSES: dict[str, Callable[[], Loss]] = {"next_token": NextTokenLoss}
"""Constructors of the losses by objective."""
