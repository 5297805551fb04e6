"""Refuse checkpoints of the hqq library that this version of transformers cannot load.

transformers 5 replaces no layer of such a checkpoint. It leaves the linears with random weights,
and only reports names of tensors. This module is imported before transformers is.
"""

from functools import wraps
from typing import Any


def extend_hqq_quantizer() -> None:
    """Let transformers' quantizer for hqq refuse a loaded model that has no layer of hqq."""
    from transformers.quantizers import quantizer_hqq

    quantizer: Any = quantizer_hqq.HqqHfQuantizer
    process = quantizer.postprocess_model

    @wraps(process)
    def postprocess_model(self: Any, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized and not any(_is_hqq(module) for module in model.modules()):
            from hqqtrain.common.errors import UserError

            raise UserError(
                f"{model.config.name_or_path}: hqq has quantized this model, and this version of "
                "transformers gives its layers random weights. Load it with transformers 4.57, or "
                "take the weights over with python -m hqqtrain task=quantize, and load quantized/ "
                "of that run."
            )
        return process(self, model, **kwargs)

    quantizer.postprocess_model = postprocess_model


def _is_hqq(module: Any) -> bool:
    """Whether a module is a linear of hqq, which need not be installed."""
    return type(module).__module__.partition(".")[0] == "hqq"
