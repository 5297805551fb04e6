"""Embeddings for new tokens: a model with more rows than its checkpoint."""

from collections.abc import Container, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.models.build import build_meta
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.models.families.structure import input_embeddings, output_head
from hqqtrain.models.fqn import base_tensors, original_module


def add_embedding_rows(
    hf_config: PretrainedConfig,
    model: PreTrainedModel,
    ids: Sequence[int],
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """Return `model`, or one with more rows in embeddings and head, for the tokens `ids`.

    Args:
        hf_config: The configuration of the model; its vocabulary grows, too.
        model: The model on the meta device.
        ids: The ids of the tokens.
        dtype: The dtype of the parameters; None: the one in the configuration.

    Raises:
        UserError: The model cannot get more rows.
    """
    missing = max(ids, default=-1) + 1 - vocabulary_size(model)
    if missing <= 0:
        return model
    hf_config.get_text_config(decoder=True).vocab_size += missing
    resized = build_meta(hf_config, dtype)
    if vocabulary_size(resized) <= max(ids):
        raise UserError(
            f"data.add_tokens: the embeddings of {type(model).__name__} have no rows for "
            f"{len(ids)} new tokens, and do not grow with vocab_size in config.json. Resize "
            "them in transformers (model.resize_token_embeddings), or set data.add_tokens=null."
        )
    return resized


def check_head_is_dense(model: nn.Module, quantized: Container[str]) -> None:
    """Check that the head is not among the modules that are `quantized`.

    Raises:
        UserError: It is, so it can get no rows for new tokens.
    """
    head = output_head(model)
    name = next((name for name, module in model.named_modules() if module is head), "")
    if name in quantized:
        raise UserError(
            f"data.add_tokens: {name} is quantized, so it can get no rows for new tokens; use "
            "a model that was quantized with lm_head in quant.skip."
        )


def vocabulary_tensors(model: nn.Module) -> dict[str, int]:
    """Return name -> number of rows of the tensors with a row for every token."""
    modules = [original_module(part(model)) for part in (input_embeddings, output_head)]
    return {
        name: tensor.shape[0]
        for name, module, _, tensor in base_tensors(model)
        if any(module is other for other in modules) and tensor.dim()
    }
