"""Read and write `quantized/`, the folder of a quantized model.

A packed weight is stored as three tensors, named like its module in the Hugging Face checkpoint
with `.W_q`, `.scale` or `.zero` appended. The dense tensors keep their names. W_q is stored as
bytes, whatever its storage dtype in memory, and each of its rows is packed alone, so any number of
ranks can read the folder in slices. `config.json` contains the settings of every layer, so nothing
else is needed to read it.

Each quantized module also has an empty tensor under the name of its dense weight. transformers
would otherwise load the folder without `import hqqtrain`, with random weights and a mere warning.
It refuses a weight of another shape.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write_json
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.formats.companions import companion_files, companion_modes, copy_companion_files
from hqqtrain.formats.fingerprint import Fingerprint
from hqqtrain.formats.manifest import DamagedError, check_sealed, is_sealed, seal
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.formats.writer import MAX_SHARD_BYTES, collective_atomic_directory, write_shards
from hqqtrain.models.fqn import base_tensors
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS, HQQLinear
from hqqtrain_kernels.reference import as_bytes

BASE_FINGERPRINT = "hqqtrain_base_fingerprint"
"""Key of the config.json of a dense model that has the dequantized weights of a quantized one.

Its value is the fingerprint of the latter, whose adapters fit both.
"""


def placeholders(settings: QuantizedSettings) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the empty tensors under the names of the dense weights; see the module's docstring."""
    for name in settings.modules:
        yield f"{name}.weight", torch.empty(0, dtype=torch.uint8)


def model_tensors(model: nn.Module, *,
                  gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
                  ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """Yield (name, tensor) of a quantized model in the saved form.

    W_q is yielded as uint8, and tied tensors only once.

    Args:
        model: The quantized model, with or without an adapter.
        gather: Makes a full tensor of a shard; for a model that is not sharded, the identity. It is
            called in the same order on every rank.
    """
    for name, module, attribute, tensor in base_tensors(model):
        full = gather(tensor.detach())
        is_codes = isinstance(module, HQQLinear) and attribute == "W_q"
        yield name, as_bytes(full) if is_codes else full


def fingerprinted(
    model: nn.Module, stored_names: Mapping[str, str] = MappingProxyType({})
) -> QuantizedSettings:
    """Return the settings of a quantized model that is not sharded, with its fingerprint.

    Args:
        model: The model.
        stored_names: The names of its quantized layers in a checkpoint, where they differ.
    """
    settings, fingerprint = QuantizedSettings.from_model(model), Fingerprint()
    names = {name: stored_names.get(name, name) for name in settings.modules}
    for name, tensor in model_tensors(model):
        module, _, attribute = name.rpartition(".")
        if module in names and attribute in PACKED_PARAMETERS:
            fingerprint.update(names[module], attribute, 0, tensor)
    settings = settings.renamed({stored: name for name, stored in names.items()})
    return replace(settings, fingerprint=fingerprint.hexdigest(settings.by_module()))


def cast_to_source_dtype(
    tensors: Iterable[tuple[str, torch.Tensor]],
    source_dtype: Callable[[str], torch.dtype | None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Cast the dense tensors back to the dtype of the source, whatever the run computes in.

    W_q, scale and zero keep their dtypes, because a dense source does not have them.

    Args:
        tensors: The stream that `model_tensors` yields.
        source_dtype: Returns the dtype of a tensor in the source, or None if the source lacks it.
    """
    for name, tensor in tensors:
        dtype = source_dtype(name) if tensor.is_floating_point() else None
        yield name, tensor if dtype is None else tensor.to(dtype)


def save_quantized(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *,
                   hf_config: PretrainedConfig, settings: QuantizedSettings, source: Path,
                   max_shard_bytes: int = MAX_SHARD_BYTES, comm: Communicator = SINGLE_PROCESS,
                   extra_json: Mapping[str, Any] = MappingProxyType({})) -> int:  # fmt: skip
    """Write a quantized model completely or not at all, with a manifest for `check_quantized`.

    Args:
        tensors: The stream that `model_tensors` yields, the same on every rank.
        folder: The folder to create or replace.
        hf_config: The configuration of the model.
        settings: The settings of the quantized layers.
        source: The folder from which to copy the tokenizer and generation settings.
        max_shard_bytes: The largest size of a file.
        comm: The ranks that write together.
        extra_json: Contents of further JSON files in the folder, by name.

    Returns:
        The bytes of all tensors.
    """
    companions = companion_files(source)
    with collective_atomic_directory(folder, comm, companion_modes(companions)) as partial:
        written = write_shards(
            chain(tensors, placeholders(settings)), partial,
            max_bytes=max_shard_bytes, comm=comm, compute_checksums=True,
        )  # fmt: skip
        if comm.is_main:
            config_json = dense_config_json(hf_config)
            config_json["quantization_config"] = settings.quantization_config()
            atomic_write_json(partial / "config.json", config_json)
            for name, content in extra_json.items():
                atomic_write_json(partial / name, content)
            copy_companion_files(companions, partial)
            seal(partial, known_digests=written.digests)
    return written.bytes


def check_quantized(folder: Path, comm: Communicator, advice: str | None = None) -> None:
    """Verify the checksums of a quantized folder. Collective.

    Each rank reads a share of the files. The fingerprint covers packed rows only, so it would miss
    a changed byte of a norm. Older versions wrote folders without a manifest; the function accepts
    these unchecked.

    Args:
        folder: The quantized folder.
        comm: The ranks that share the work.
        advice: The last sentence of the message. By default it says to delete the folder.

    Raises:
        UserError: A file is not what was written. Raised on every rank.
    """
    with comm.raise_on_all_ranks():
        if is_sealed(folder):
            try:
                check_sealed(folder, comm.rank, comm.size)
            except DamagedError as error:
                advice = advice or f"Delete {folder} and run again to quantize again."
                raise UserError(f"{error}. {advice}") from error


def dense_config_json(hf_config: PretrainedConfig) -> dict[str, Any]:
    """Return the config.json of a dense model of this configuration, with `architectures`."""
    # This is transformers' own encoding, which has no bare Infinity, as JSON does not have one.
    config_json = json.loads(hf_config.to_json_string(use_diff=True))
    if not config_json.get("architectures"):
        config_json["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    for key in ("quantization_config", BASE_FINGERPRINT):
        config_json.pop(key, None)
    return config_json
