"""Export to GGUF, for llama.cpp, Ollama and LM Studio, in one file with our codes.

The file has the name of the model and of the type of most weights. An adapter is a file beside it,
or is merged where the sum is rounded to 8 bits. `Modelfile` tells Ollama of both.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PretrainedConfig

from hqqtrain.common.files import atomic_write
from hqqtrain.common.packed_folders import GGUF_ADAPTER
from hqqtrain.config.export import ExportConfig
from hqqtrain.formats.base import Accept, ExportFormat, ModelExport, WrittenModel, accept_all
from hqqtrain.formats.gguf.adapter import write_gguf_adapter
from hqqtrain.formats.gguf.block_types import (
    Q2_K,
    Q4_1,
    Q8_0,
    BlockType,
    block_type_refusals,
    choose_block_type,
)
from hqqtrain.formats.gguf.conversion import Conversion, FamilyConversion
from hqqtrain.formats.gguf.families import family_refusals
from hqqtrain.formats.gguf.metadata import write_general
from hqqtrain.formats.gguf.package import import_gguf
from hqqtrain.formats.gguf.reader import GgufLayers
from hqqtrain.formats.gguf.skeleton import SkeletonConversion, check_llama_cpp
from hqqtrain.formats.gguf.tensors import TensorStream, gguf_entries
from hqqtrain.formats.gguf.writer import GgufFile
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.formats.read_back import compare_export
from hqqtrain.formats.writer import collective_atomic_directory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufFormat(ExportFormat):
    """A GGUF file.

    Attributes:
        block_type: The type of quantized weights, or `auto`.
        llama_cpp: The folder of llama.cpp, whose converter writes the metadata; None: we do.
    """

    name: ClassVar[str] = "gguf"
    merges: ClassVar[str] = "export.format=dense or export.gguf_type=Q8_0 merges it."
    holds_dense: ClassVar[bool] = True
    has_tokenizer: ClassVar[bool] = True
    block_type: str = "auto"
    llama_cpp: Path | None = None

    def configured(self, config: ExportConfig) -> "GgufFormat":
        """Return the format with the keys of `config`, if what it needs is installed."""
        import_gguf()
        if config.llama_cpp:
            check_llama_cpp(Path(config.llama_cpp))
        return GgufFormat(config.gguf_type, Path(config.llama_cpp) if config.llama_cpp else None)

    def forms_of(self, settings: QuantizedSettings) -> tuple[str, ...]:
        """Return that an adapter may be merged where all weights have 8 bits."""
        kinds = [choose_block_type(m, self.block_type) for m in settings.modules.values()]
        return ("merge", "separate") if all(kind is Q8_0 for kind in kinds) else ("separate",)

    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield why GGUF cannot hold a model with these settings."""
        yield from block_type_refusals(settings, self.block_type)
        if self.llama_cpp is None:
            yield from family_refusals(hf_config, settings)

    def write(self, export: ModelExport, folder: Path, accept: Accept = accept_all) -> None:
        """Write the file, compare it with the model, and give the folder its name. Collective."""
        comm, dtype, kinds = export.comm, export.dtype or torch.float16, self._kinds(export)
        with comm.raise_on_all_ranks():
            if export.adapter and export.adapter_form != "none":
                export.adapter.check_base(export.settings.fingerprint, "adapter")
        main = Counter(kind.name for kind in kinds.values()).most_common(1)
        main_type = main[0][0] if main else "F16"
        with collective_atomic_directory(folder, comm) as partial:
            conversion = self._conversion(export, dtype, partial / "converting")
            path = partial / f"{export.name}-{main_type}.gguf"
            stream = TensorStream(export, conversion, kinds, dtype)
            with comm.raise_on_all_ranks():
                context = (
                    _open(path, export, conversion, kinds, main_type)
                    if comm.is_main
                    else nullcontext()
                )
            with comm.raise_on_all_ranks(), context as file:
                stream.write(file)
                if comm.is_main:
                    _write_companions(export, conversion, kinds, path)
                    conversion.finish()
            layers = GgufLayers(path, conversion, kinds)
            comparison = compare_export(export, layers.stored)
            accept(WrittenModel(self.name, dtype, comparison, layers.linear))

    def _conversion(self, export: ModelExport, dtype: torch.dtype, work: Path) -> Conversion:
        """Return the conversion; llama.cpp's converter gets the folder `work`. Collective."""
        if self.llama_cpp:
            return SkeletonConversion(export, dtype, self.llama_cpp, work)
        return FamilyConversion(export, dtype)

    def _kinds(self, export: ModelExport) -> dict[str, BlockType]:
        """Return the type of the blocks of each layer; `refusals` knows that there is one."""
        settings = export.settings.modules
        chosen = {
            name: choose_block_type(module, self.block_type) for name, module in settings.items()
        }
        kinds = {name: kind for name, kind in chosen.items() if kind}
        large = [n for n, kind in kinds.items() if kind is Q4_1 and settings[n].nbits <= Q2_K.nbits]
        if large and export.comm.is_main:
            logger.warning(
                "export.format=gguf: %d layers take 5 bits per weight (Q4_1), because Q2_K needs "
                "rows of a multiple of 256 weights, and %s has %d.", len(large), large[0],
                settings[large[0]].in_features,
            )  # fmt: skip
        return kinds


def _open(
    path: Path, export: ModelExport, conversion: Conversion, kinds: Mapping[str, BlockType],
    main_type: str,
) -> GgufFile:  # fmt: skip
    """Create the file with all metadata."""
    writer = import_gguf().GGUFWriter(None, conversion.architecture)
    write_general(
        writer, name=export.name, fingerprint=export.settings.fingerprint, main_type=main_type
    )
    conversion.write_metadata(writer)
    return GgufFile(path, writer, gguf_entries(export, conversion, kinds))


def _write_companions(
    export: ModelExport, conversion: Conversion, kinds: Mapping[str, BlockType], path: Path
) -> None:
    """Write the adapter, and a Modelfile, beside the file."""
    lines = [f"FROM ./{path.name}"]
    if export.separate:
        names = set(gguf_entries(export, conversion, kinds))
        dtype = export.dtype or torch.float16
        write_gguf_adapter(export.separate, path.with_name(GGUF_ADAPTER), conversion, dtype, names)
        lines.append(f"ADAPTER ./{GGUF_ADAPTER}")
    atomic_write(path.with_name("Modelfile"), "\n".join(lines) + "\n")
