"""`prepare_for_inference`: the changes that make a quantized model generate faster.

They keep the weights and the outputs, up to the rounding of another order of sums, or of another
backend. A model that was prepared cannot be trained or saved as a quantized model.
"""

import logging

from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.public_function import public_function
from hqqtrain.inference.backends.registry import find_backend, repack_linears
from hqqtrain.inference.grouped_attention import use_grouped_attention
from hqqtrain.inference.merged_linears import merge_linears
from hqqtrain.models.fqn import base_model
from hqqtrain.models.offload import offload_meta, offloads_meta

logger = logging.getLogger(__name__)


@public_function(model=nn.Module)
def prepare_for_inference(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Merge q, k and v, and gate and up, and do not copy the cache for grouped queries, in place.

    Args:
        model: A quantized model of transformers, or one with PEFT adapters. Adapters stay apart.
        backend: Whose kernels multiply with the quantized weights. `auto`: hqqtrain's own;
            `gemlite`, `humming` or `torchao`: those of another package, for all layers that it can
            compute, in the dtype and on the device that the model has now. hqq's name
            `torchao_int4` is allowed, too.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: The backend is unknown, is not installed, or can compute none of the layers; or
            scale and zero are in host memory.
    """
    foreign = find_backend(backend)
    base = base_model(model)
    offloads = offloads_meta(base)
    if foreign and offloads:
        raise UserError(
            f"backend={backend}: its layers stay on the device, but scale and zero of the model "
            "are in host memory (offload_meta); use auto."
        )
    merged = merge_linears(base)
    if offloads:
        offload_meta(base)
    grouped = use_grouped_attention(base)
    logger.info(
        "prepared for inference: %d merged products%s",
        merged, ", attention without a copy of the cache" if grouped else "",
    )  # fmt: skip
    if foreign:
        repack_linears(base, foreign)
    return model.eval()
