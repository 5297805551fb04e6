"""Prove that no memory of a loaded model is uninitialized.

`materialize` allocates uninitialized memory for the whole model, and nothing that is left of it may
ever be read.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.models.fqn import base_model, is_adapter, is_packed, strip_wrappers


def check_filled(model: nn.Module, filled: Iterable[Tensor]) -> None:
    """Check that every parameter and buffer of the base model has got its values.

    Args:
        model: The loaded model.
        filled: The tensors that have values, in addition to the packed weights.

    Raises:
        UserError: A tensor has none.
    """
    filled_ids, root = {id(tensor) for tensor in filled}, base_model(model)
    for path, module in root.named_modules():
        options = {"recurse": False, "remove_duplicate": False}
        tensors = [*module.named_parameters(**options), *module.named_buffers(**options)]
        # A tensor may also be a plain attribute.
        for attribute, tensor in [*tensors, *vars(module).items()]:
            name = f"{path}.{attribute}".removeprefix(".")
            if not isinstance(tensor, Tensor) or is_adapter(name) or is_packed(module, attribute):
                continue
            if id(tensor) not in filled_ids:
                raise UserError(
                    f"{type(root).__name__}: {strip_wrappers(name)} has no values after loading; "
                    "this model is not supported."
                )
