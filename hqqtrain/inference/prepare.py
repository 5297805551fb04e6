"""`prepare_for_inference`: the changes that make a quantized model generate faster.

They keep the weights and the outputs, up to the rounding of another order of sums. A model that was
prepared cannot be trained or saved as a quantized model.
"""

import logging

from torch import nn

from hqqtrain.inference.grouped_attention import use_grouped_attention
from hqqtrain.inference.merged_linears import merge_linears
from hqqtrain.models.fqn import base_model

logger = logging.getLogger(__name__)


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Merge q, k and v, and gate and up, and do not copy the cache for grouped queries, in place.

    Args:
        model: A quantized model of transformers, or one with PEFT adapters. Adapters stay apart.

    Returns:
        The model, in evaluation mode.
    """
    base = base_model(model)
    merged = merge_linears(base)
    grouped = use_grouped_attention(base)
    logger.info(
        "prepared for inference: %d merged products%s",
        merged, ", attention without a copy of the cache" if grouped else "",
    )  # fmt: skip
    return model.eval()
