"""Where the parts of a causal language model are: text backbone, decoder layers, embeddings, head.

All code that shards, counts or calls one of these parts asks here instead of guessing. The model
may be on the meta device, wrapped (PEFT, DDP, FSDP), and have quantized linears. No family needs an
entry in a table for these answers: they follow from the methods and configuration that every
transformers model has.
"""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hqqtrain.common.errors import UserError
from hqqtrain.models.fqn import base_model, strip_wrappers


def text_config(model: nn.Module) -> PretrainedConfig:
    """Return the configuration of the language model.

    In a vision-language model it is a part of the whole configuration.
    """
    return base_model(model).config.get_text_config(decoder=True)


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds the tokens; None if the model does not say which it is."""
    root = _root(model)
    try:
        return root.get_input_embeddings() if isinstance(root, PreTrainedModel) else None
    except NotImplementedError:
        return None


def output_head(model: nn.Module) -> Any:
    """Return the module that computes the logits; None if the model has none."""
    return base_model(model).get_output_embeddings()


def text_backbone(model: nn.Module) -> nn.Module:
    """Return the module with the input embeddings and the decoder layers.

    The vision tower of a vision-language model is not part of it. transformers' own `get_decoder`
    is right for most models, but some return their head or themselves. For those the backbone is
    the smallest module around the embeddings that contains a list of modules, or the whole model.
    """
    root, embeddings = _root(model), input_embeddings(model)
    decoder = root.get_decoder() if isinstance(root, PreTrainedModel) else root
    if decoder is not root and _module_lists(decoder):
        return decoder
    path = next((name for name, module in root.named_modules() if module is embeddings), "")
    while path:
        path = path.rpartition(".")[0]
        if _module_lists(root.get_submodule(path)):
            break
    return root.get_submodule(path)


def find_decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """Return the stack of decoder layers; None if the model has none.

    It is the list in the text backbone that has `num_hidden_layers` modules. Without such a list it
    is the longest one. If several qualify, it is the first of them.
    """
    config = text_config(model) if isinstance(_root(model), PreTrainedModel) else None
    num_layers = getattr(config, "num_hidden_layers", None)
    lists = _module_lists(text_backbone(model))
    return max(lists, key=lambda layers: (len(layers) == num_layers, len(layers)), default=None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the stack of decoder layers, to shard it.

    Raises:
        UserError: The model has none.
    """
    layers = find_decoder_layers(model)
    if layers is None:
        raise UserError(
            f"{type(model).__name__}: has no list of decoder layers to shard; use "
            "parallel.strategy=ddp."
        )
    return layers


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers that can recompute one by one; empty if the model has none.

    Some models have decoder layers of their own, which recompute all together or not at all.
    """
    found = [
        next((m for m in layer.modules() if isinstance(m, GradientCheckpointingLayer)), None)
        for layer in find_decoder_layers(model) or ()
    ]
    layers: list[nn.Module] = [layer for layer in found if layer is not None]
    return layers if len(layers) == len(found) else []


def describe_decoder_layers(model: nn.Module) -> str:
    """Return number, class and name of the decoder layers, for the log.

    An example is `28 x LlamaDecoderLayer at model.layers`.
    """
    layers = decoder_layers(model)
    name = next(name for name, module in _root(model).named_modules() if module is layers)
    return f"{len(layers)} x {type(layers[0]).__name__} at {strip_wrappers(name)}"


def _root(model: nn.Module) -> nn.Module:
    """Return the transformers model inside its wrappers, or `model` if there is none."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _module_lists(module: nn.Module) -> list[nn.ModuleList]:
    """Return the lists of modules in `module` that are not empty."""
    return [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
