"""Where the parts of an architecture are: its stack of decoder layers."""

from torch import nn

from hqqtrain.common.errors import UserError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the longest `nn.ModuleList` of `model`, named `layers` or `h` in most architectures.

    Raises:
        UserError: The model has no `nn.ModuleList`.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise UserError(
            f"{type(model).__name__}: has no list of decoder layers to shard; use "
            "parallel.strategy=ddp."
        )
    return max(stacks, key=len)
