"""`quantized/`: the packed model as a folder that says how to read itself.

Tensors have their Hugging Face names + `.W_q .scale .zero`, beside everything that stayed in
full precision; W_q is stored as bytes however it was held. `config.json` carries the settings
of every layer, so the folder can be read, in slices, by any number of ranks.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
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
from hqqtrain.formats.manifest import DamagedError, check_sealed, is_sealed, seal
from hqqtrain.formats.writer import MAX_SHARD_BYTES, collective_atomic_directory, write_shards
from hqqtrain.models.fqn import base_model, base_tensors, strip_wrappers
from hqqtrain.models.source import read_config_json
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels.layout import LAYOUT_VERSION, Layout
from hqqtrain_kernels.reference import as_bytes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_META_DTYPES = {_name(d): d for d in (torch.float32, torch.bfloat16, torch.float16)}

_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "chat_template.*", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class ModuleSettings:
    """How one linear is quantized, in JSON's types; `group_size` None: a whole row or column."""

    nbits: int
    group_size: int | None
    axis: int
    solver: str
    meta_dtype: str
    out_features: int
    in_features: int

    @classmethod
    def of(cls, module: HQQLinear) -> "ModuleSettings":
        spec, layout = module.spec, module.layout
        dtype = _name(spec.meta_dtype)
        shape = (layout.out_features, layout.in_features)
        return cls(spec.nbits, spec.group_size, spec.axis, spec.solver, dtype, *shape)

    @property
    def spec(self) -> QuantSpec:
        """Raises KeyError for an unknown `meta_dtype`."""
        settings = (self.nbits, self.group_size, self.axis, self.solver)
        return QuantSpec(*settings, _META_DTYPES[self.meta_dtype])

    @property
    def layout(self) -> Layout:
        return self.spec.layout(self.out_features, self.in_features)


@dataclass(frozen=True)
class QuantizedSettings:
    """What config.json of a quantized model says beyond the architecture."""

    modules: dict[str, ModuleSettings]
    fingerprint: str

    @classmethod
    def of(cls, model: nn.Module, fingerprint: str = "") -> "QuantizedSettings":
        """The settings of every HQQLinear in `model`, by its name in the checkpoint."""
        named = base_model(model).named_modules()
        linears = {strip_wrappers(n): m for n, m in named if isinstance(m, HQQLinear)}
        return cls({n: ModuleSettings.of(m) for n, m in linears.items()}, fingerprint)

    def by_module(self) -> dict[str, dict[str, Any]]:
        """The settings as JSON values: what `Fingerprint.hexdigest` takes."""
        return {name: asdict(settings) for name, settings in self.modules.items()}

    def quantization_config(self) -> dict[str, Any]:
        head = {"quant_method": "hqqtrain", "layout_version": LAYOUT_VERSION}
        return head | {"fingerprint": self.fingerprint, "modules": self.by_module()}


def quantized_settings(folder: Path) -> QuantizedSettings:
    """The settings in config.json of a quantized folder.

    Raises UserError where it is not ours, was written by a newer layout, or is damaged.
    """
    found = read_config_json(folder).get("quantization_config") or {}
    path = folder / "config.json"
    if found.get("quant_method") != "hqqtrain":
        raise UserError(f"{path}: not a model quantized by hqqtrain.")
    if found.get("layout_version") != LAYOUT_VERSION:
        raise UserError(
            f"{path}: layout_version={found.get('layout_version')}; this hqqtrain reads "
            f"{LAYOUT_VERSION}. Use the version that wrote it, or quantize again."
        )
    try:
        modules = {name: ModuleSettings(**values) for name, values in found["modules"].items()}
        for settings in modules.values():
            _ = settings.layout
        return QuantizedSettings(modules, found["fingerprint"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: quantization_config is damaged ({error}).") from error


def model_tensors(model: nn.Module, *,
                  gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
                  ) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """(name, tensor) of a quantized model as it is saved; W_q as uint8, tied tensors once.

    `gather` makes a whole tensor of a shard; it is called in the same order on every rank.
    """
    for name, module, leaf, tensor in base_tensors(model):
        whole = gather(tensor.detach())
        packed = isinstance(module, HQQLinear) and leaf == "W_q"
        yield name, as_bytes(whole) if packed else whole


def reader_tensors(reader: SafetensorsReader) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in a checkpoint, by name, one at a time."""
    for name in reader.names:
        yield name, reader.read(name)


def save_quantized(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *,
                   hf_config: PretrainedConfig, settings: QuantizedSettings, source: Path,
                   max_shard_bytes: int = MAX_SHARD_BYTES, comm: Communicator = SINGLE_PROCESS,
                   beside: Mapping[str, Any] = MappingProxyType({})) -> int:  # fmt: skip
    """Write `folder`, complete or not at all; returns the bytes of all tensors.

    `tensors`: as `model_tensors` yields them, on all of `comm` alike. Tokenizer and
    generation settings are copied from `source`, the folder that the model was read from.
    `beside`: JSON files to write there, by name. A manifest.json says what `check_quantized` is to
    find.
    """
    with collective_atomic_directory(folder, comm) as partial:
        done = write_shards(tensors, partial, max_bytes=max_shard_bytes, comm=comm, hashed=True)
        if comm.is_main:
            extra = {"quantization_config": settings.quantization_config()}
            atomic_write_json(partial / "config.json", quantized_config_json(hf_config) | extra)
            for name, value in beside.items():
                atomic_write_json(partial / name, value)
            copy_companions(source, partial)
            seal(partial, known=done.facts)
    return done.bytes


def check_quantized(folder: Path, comm: Communicator, way_out: str | None = None) -> None:
    """Reads all that `save_quantized` has written, each rank a share of the files. Collective.

    The fingerprint covers packed rows alone: a norm that lost a byte would go unnoticed. A folder
    without a manifest, as an older version wrote it, is taken as it is.

    Raises UserError on every rank where a file is not what was written. `way_out`: what helps;
    by default to delete the folder.
    """
    with comm.raise_on_all_ranks():
        if is_sealed(folder):
            try:
                check_sealed(folder, comm.rank, comm.size)
            except DamagedError as error:
                anew = f"Delete {folder} and run again: it is then quantized anew."
                raise UserError(f"{error}. {way_out or anew}") from error


def quantized_config_json(hf_config: PretrainedConfig) -> dict[str, Any]:
    """What config.json of a dense model of this configuration holds, with `architectures`."""
    found = hf_config.to_diff_dict()
    if not found.get("architectures"):
        found["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    return {k: v for k, v in found.items() if k != "quantization_config"}


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer and generation files; links (of the hub's cache) become files."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
