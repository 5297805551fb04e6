"""The formats of `export.format`, by name.

To add a format, write its writer, register it here, and add its name to
`hqqtrain.config.export.EXPORT_FORMATS`, which the command line reads without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.local import full_tensor
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.dense import dense_tensors, export_dense
from hqqtrain.formats.packed import cast_to_source_dtype, model_tensors, save_quantized


@dataclass(frozen=True)
class ExportFormat:
    """A format in which a model can be exported.

    Attributes:
        name: The value of `export.format`.
        write: Writes a model to a folder, completely or not at all. Collective.
        merges_adapter: Whether the adapter is part of what is written.
    """

    name: str
    write: Callable[[ModelExport, Path], object]
    merges_adapter: bool

    def check_adapter(self, adapter: Path | None) -> None:
        """Check that the format does not silently drop the adapter in the folder `adapter`.

        Raises:
            UserError: The model has an adapter, and this format has no place for one.
        """
        if adapter is None or self.merges_adapter:
            return
        raise UserError(
            f"export.format={self.name}: would leave out the adapter in {adapter}. Use "
            "export.format=dense, which merges it, or export the base alone: name the quantized/ "
            "of the run in model.name_or_path, and leave adapter.init_from unset."
        )


def write_dense(export: ModelExport, folder: Path) -> int:
    """Write dense weights with the adapter merged in, for any tool. Collective."""
    tensors = dense_tensors(
        model_tensors(export.model, gather=full_tensor),
        export.settings,
        export.adapter,
        dtype=export.dtype,
        device=export.device,
    )
    is_base = export.adapter is None and bool(export.settings.modules)
    return export_dense(
        tensors,
        folder,
        hf_config=export.hf_config,
        source=export.tokenizer,
        adapter=export.adapter_folder,
        dtype=export.dtype,
        base_fingerprint=export.settings.fingerprint if is_base else None,
        comm=export.comm,
    )


def write_packed(export: ModelExport, folder: Path) -> int:
    """Write the packed base, in the form of a run's `quantized/`. Collective."""
    return save_quantized(
        cast_to_source_dtype(model_tensors(export.model, gather=full_tensor), export.source_dtype),
        folder,
        hf_config=export.hf_config,
        settings=export.settings,
        source=export.tokenizer,
        comm=export.comm,
    )


FORMATS: dict[str, ExportFormat] = {
    format.name: format
    for format in (
        ExportFormat("dense", write_dense, merges_adapter=True),
        ExportFormat("packed", write_packed, merges_adapter=False),
    )
}
"""The formats, by the values of `export.format`."""
