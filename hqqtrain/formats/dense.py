"""Export dense weights for other tools: dequantized, with the adapter merged.

The adapter was trained on the errors of the quantized weights. It is therefore merged into the
dequantized weights and not into the original ones, unless it was trained on those. The sum is
computed in fp32 and rounded once. Tensors are streamed one at a time, so the whole model is never
in memory.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write_json
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats.companions import companion_files, companion_modes, copy_companion_files
from hqqtrain.formats.packed import BASE_FINGERPRINT, dense_config_json
from hqqtrain.formats.peft import Adapter
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.formats.writer import MAX_SHARD_BYTES, collective_atomic_directory, write_shards
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import tied_names
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS
from hqqtrain.quant.quantize import QuantizedWeight, dequantize_weight

Tensors = Iterable[tuple[str, torch.Tensor]]
"""A stream of (name, tensor)."""


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
    # Collect the W_q, scale and zero of a layer until all three have arrived.
    incomplete: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        module, _, attribute = name.rpartition(".")
        if module in settings.modules and not tensor.numel():
            continue  # a placeholder of the folder
        if module not in settings.modules or attribute not in PACKED_PARAMETERS:
            if adapter and name in replaced:
                tensor = adapter.replaced(name, tensor)
                replaced.remove(name)
            if adapter and module in unmerged and attribute == "weight":
                tensor = _merge(adapter, module, tensor.to(device, torch.float32))
                unmerged.remove(module)
            yield name, _round(name, tensor, dtype) if tensor.is_floating_point() else tensor
            continue
        packed = incomplete.setdefault(module, {})
        packed[attribute] = tensor.to(device)
        if len(packed) == len(PACKED_PARAMETERS):
            quantized = QuantizedWeight(**incomplete.pop(module))
            weight = dequantize_weight(quantized, settings.modules[module].layout, torch.float32)
            if adapter and module in unmerged:
                weight = _merge(adapter, module, weight)
                unmerged.remove(module)
            yield f"{module}.weight", _round(f"{module}.weight", weight, dtype)
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
    assert not incomplete, f"tensors are missing of {sorted(incomplete)}"


def _merge(adapter: Adapter, module: str, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` [out_features, in_features], fp32, with the adapter of `module` added."""
    merged = adapter.delta(module, weight.device)
    merged += weight
    if not merged.isfinite().all():
        raise UserError(
            f"{module}: its weight is infinite or NaN once the adapter is merged; the "
            "adapter is damaged or has diverged. Use another checkpoint."
        )
    return merged


def _round(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` in `dtype`, in which every finite value must stay finite."""
    rounded = tensor.to(dtype)
    if (tensor.isfinite() & ~rounded.isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise UserError(
            f"{name}: has the value {largest:g}, which is beyond the range of {dtype}; export with "
            "train.precision=bf16 or fp32."
        )
    return rounded


def export_dense(tensors: Tensors, folder: Path, *, hf_config: PretrainedConfig, source: Path,
                 dtype: torch.dtype, adapter: Path | None = None,
                 base_fingerprint: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
                 comm: Communicator = SINGLE_PROCESS) -> int:  # fmt: skip
    """Write a checkpoint for `AutoModelForCausalLM.from_pretrained`, completely or not at all.

    Args:
        tensors: The stream that `dense_tensors` yields, the same on every rank.
        folder: The folder to create or replace.
        hf_config: The configuration of the model.
        source: The folder from which to copy the tokenizer and generation settings.
        dtype: The dtype of the floating-point tensors in `tensors`.
        adapter: The folder of the merged adapter, whose generation settings take precedence.
        base_fingerprint: The fingerprint of the quantized model, if its weights are written without
            an adapter; its adapters fit them.
        max_shard_bytes: The largest size of a file.
        comm: The ranks that write together.

    Returns:
        The bytes of all tensors.
    """
    names: set[str] = set()

    def with_recorded_names() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            names.add(name)
            yield name, tensor

    companions = companion_files(source, adapter)
    with collective_atomic_directory(folder, comm, companion_modes(companions)) as partial:
        written = write_shards(with_recorded_names(), partial, max_bytes=max_shard_bytes, comm=comm)
        if comm.is_main:
            config_json = dense_config_json(_export_config(hf_config, dtype, names))
            if base_fingerprint:
                config_json[BASE_FINGERPRINT] = base_fingerprint
            atomic_write_json(partial / "config.json", config_json)
            copy_companion_files(companions, partial)
    return written.bytes


def _check_adapter(adapter: Adapter | None, settings: QuantizedSettings) -> None:
    if adapter is None:
        return
    adapter.check_base(settings.fingerprint, "adapter")
    if not settings.modules:  # nothing is quantized, and loading has checked the layers
        return
    unknown_modules = sorted(set(adapter.modules) - settings.modules.keys())
    if unknown_modules:
        raise UserError(
            f"adapter: adapts {unknown_modules[0]}, which is not a quantized linear layer of this "
            "base; use an adapter of this model."
        )


def _export_config(
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
