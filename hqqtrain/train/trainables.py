"""Which parameters are trained: defined here, once.

The optimizer steps on them, checkpoints have them, and `adapter/` is made of them.
"""

from torch import nn

from hqqtrain.models.fqn import peft_key


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that require a gradient, by PEFT's names.

    Loading makes exactly the parameters of the training method require one: today, the adapters.
    """
    named = model.named_parameters()
    return {peft_key(name): param for name, param in named if param.requires_grad}
