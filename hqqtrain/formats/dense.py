"""Make the dense weights of a quantized model: dequantized, with the adapter merged.

The adapter was trained on the errors of the quantized weights. It is therefore merged into the
dequantized weights and not into the original ones, unless it was trained on those. The sum is
computed in fp32 and rounded once. Tensors are streamed one at a time, so the whole model is never
in memory.
"""

import copy
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig

from hqqtrain.common.errors import UserError
from hqqtrain.formats.layers import PackedLayer, Tensors, by_layer
from hqqtrain.formats.peft import Adapter
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import tied_names


def dense_tensors(tensors: Tensors, settings: QuantizedSettings, adapter: Adapter | None = None,
                  *, dtype: torch.dtype, device: torch.device | str = "cpu",
                  ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """Convert a stream of a quantized model's tensors to the stream of its dense equivalent.

    Args:
        tensors: The stream that `model_tensors` yields, or the tensors of a quantized folder.
        settings: The settings of the quantized model.
        adapter: The adapter to merge.
        dtype: The dtype of every floating-point tensor that is yielded.
        device: The device on which to dequantize and merge.

    Yields:
        (name, tensor), with Hugging Face's names.

    Raises:
        UserError: `adapter` belongs to another base or to modules that the model does not have, or
            a value is not finite in `dtype`.
    """
    unmerged = set(adapter.modules) if adapter else set()
    replaced = set(adapter.base_tensors) if adapter else set()
    _check_adapter(adapter, settings)
    for name, value in by_layer(tensors, settings, device):
        if isinstance(value, PackedLayer):
            name, tensor = f"{name}.weight", value.dequantize()
        elif adapter and name in replaced:
            tensor = adapter.replaced(name, value)
            replaced.remove(name)
        else:
            tensor = value
        module = name.removesuffix(".weight")
        if adapter and module != name and module in unmerged:
            tensor = merge(adapter, module, tensor.to(device, torch.float32))
            unmerged.remove(module)
        yield name, round_finite(name, tensor, dtype) if tensor.is_floating_point() else tensor
    if replaced:
        raise UserError(
            f"adapter: has trained {min(replaced)}, which this base does not have, or has "
            "quantized; use an adapter of this model."
        )
    if unmerged:
        raise UserError(
            f"adapter: adapts {min(unmerged)}, whose weight is tied to that of another module, so "
            "it cannot be merged; leave the layer in quant.skip and train a new adapter."
        )


def merge(adapter: Adapter, module: str, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [out_features, in_features], fp32, with the adapter of `module` added."""
    merged = adapter.delta(module, weight.device)
    merged += weight
    if not merged.isfinite().all():
        raise UserError(
            f"{module}: its weight is infinite or NaN once the adapter is merged; the "
            "adapter is damaged or has diverged. Use another checkpoint."
        )
    return merged


def round_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` in `dtype`, in which every finite value must stay finite.

    Raises:
        UserError: A value is beyond the range of `dtype`.
    """
    rounded = tensor.to(dtype)
    if (tensor.isfinite() & ~rounded.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise UserError(
            f"{name}: has the value {largest:g}, which is beyond the range of {dtype}; export with "
            "export.dtype=bf16 or fp32."
        )
    return rounded


def _check_adapter(adapter: Adapter | None, settings: QuantizedSettings) -> None:
    if adapter is None:
        return
    if not settings.modules:  # nothing is quantized, and loading has checked the layers
        return
    unknown_modules = sorted(set(adapter.modules) - settings.modules.keys())
    if unknown_modules:
        raise UserError(
            f"adapter: adapts {unknown_modules[0]}, which is not a quantized linear layer of this "
            "base; use an adapter of this model."
        )


def untied_config(
    hf_config: PretrainedConfig, dtype: torch.dtype, names: set[str]
) -> PretrainedConfig:
    """Return the configuration of an exported model with the tensors `names`.

    Tying is disabled if the model contains all tied parameters, which have their own weights then.
    A head that was quantized has. If some are still tied, as the bias of BERT's head, tying stays
    enabled: transformers does not tie parameters for which it finds different weights.
    """
    config = copy.deepcopy(hf_config)
    config.dtype = dtype
    if tied_names(build_meta(hf_config)).keys() <= names:
        config.tie_word_embeddings = False
    return config
