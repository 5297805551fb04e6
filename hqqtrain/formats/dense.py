"""Exporting to other tools: dense weights, dequantized, with the adapter merged in.

The adapter was trained on the errors of the quantized weights, so it is merged into
dequantize(W_q), in fp32, and rounded once; never into the original weights. Tensors pass
through one at a time: the whole model is never in memory.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write_json
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats.packed import (
    ModuleSettings,
    QuantizedSettings,
    copy_companions,
    quantized_config_json,
)
from hqqtrain.formats.peft import Adapter
from hqqtrain.formats.writer import MAX_SHARD_BYTES, collective_atomic_directory, write_shards
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import tied_names
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS
from hqqtrain.quant.quantize import QuantizedWeight, dequantize_weight

Tensors = Iterable[tuple[str, torch.Tensor]]


def dense_tensors(tensors: Tensors, settings: QuantizedSettings, adapter: Adapter | None = None,
                  *, dtype: torch.dtype, device: torch.device | str = "cpu",
                  ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """Turn a stream of a quantized model's tensors into that of its dense equivalent.

    `tensors`: as `model_tensors` or `reader_tensors` give them. Every float becomes `dtype`.
    Raises UserError where `adapter` belongs to another base or to modules that are not there.
    """
    adapted = set(adapter.modules) if adapter else set()
    _check_adapter(adapter, settings)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        module, _, leaf = name.rpartition(".")
        if module not in settings.modules or leaf not in PACKED_PARAMETERS:
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[leaf] = tensor.to(device)
        if len(parts) == len(PACKED_PARAMETERS):
            weight = _dense(waiting.pop(module), settings.modules[module])
            if adapter and module in adapted:
                weight += adapter.delta(module, device)
            yield f"{module}.weight", weight.to(dtype)
    assert not waiting, f"incomplete: {sorted(waiting)}"


def export_dense(tensors: Tensors, folder: Path, *, hf_config: PretrainedConfig, source: Path,
                 dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES,
                 comm: Communicator = SINGLE_PROCESS) -> int:  # fmt: skip
    """Write the checkpoint that `AutoModelForCausalLM.from_pretrained` loads; returns its bytes.

    `tensors`: as `dense_tensors` gives them, all floats in `dtype`, on all of `comm` alike.
    `source`: the folder that tokenizer and generation settings are copied from. Complete or not
    at all.
    """
    written: set[str] = set()
    with collective_atomic_directory(folder, comm) as partial:
        stream = _noting(tensors, written)
        done = write_shards(stream, partial, max_bytes=max_shard_bytes, comm=comm)
        if comm.is_main:
            values = quantized_config_json(_export_config(hf_config, dtype, written))
            atomic_write_json(partial / "config.json", values)
            copy_companions(source, partial)
    return done.bytes


def _dense(parts: dict[str, torch.Tensor], settings: ModuleSettings) -> torch.Tensor:
    return dequantize_weight(QuantizedWeight(**parts), settings.layout, torch.float32)


def _check_adapter(adapter: Adapter | None, settings: QuantizedSettings) -> None:
    if adapter is None:
        return
    adapter.check_base(settings.fingerprint, "adapter")
    strangers = sorted(set(adapter.modules) - settings.modules.keys())
    if strangers:
        raise UserError(
            f"adapter: adapts {strangers[0]}, which is no quantized linear of this base; it "
            "belongs to another model."
        )


def _noting(tensors: Tensors, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        names.add(name)
        yield name, tensor


def _export_config(hf_config: PretrainedConfig, dtype: torch.dtype, written: set[str],
                   ) -> PretrainedConfig:  # fmt: skip
    """A tied parameter that has weights of its own by now (a quantized lm_head) is untied."""
    config = copy.deepcopy(hf_config)
    config.dtype = dtype
    if written & tied_names(build_meta(hf_config)).keys():
        config.tie_word_embeddings = False
    return config
