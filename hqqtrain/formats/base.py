"""The protocol of an export format, and its input.

It is a module of its own, because the registry imports the formats, and every format needs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig

from hqqtrain.common.errors import UserError
from hqqtrain.config.export import ExportConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.local import full_tensor
from hqqtrain.formats.comparison import ExportComparison
from hqqtrain.formats.layers import Tensors
from hqqtrain.formats.packed import model_tensors
from hqqtrain.formats.peft import Adapter
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.formats.writer import MAX_SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class ModelExport:
    """A quantized model to write, which may be sharded.

    Attributes:
        model: The loaded model, with or without adapters.
        settings: The settings of its quantized layers.
        hf_config: Its configuration.
        tokenizer: The folder from which to copy the tokenizer and generation settings.
        source_dtype: Returns the dtype of a tensor in the source, or None if the source lacks it.
        adapter: The adapter that belongs to the model, if any.
        adapter_folder: Its folder.
        adapter_form: What becomes of the adapter: `merge`, `separate` or `none`.
        dtype: The dtype of dense weights; None: the one that suits the format.
        compute_dtype: The dtype that the model computes in.
        device: The device on which to dequantize and merge.
        comm: The ranks that write together.
        max_shard_bytes: The largest size of a file.
        name: The name of the model, for formats that show it.
    """

    model: nn.Module
    settings: QuantizedSettings
    hf_config: PretrainedConfig
    tokenizer: Path
    source_dtype: Callable[[str], torch.dtype | None]
    adapter: Adapter | None = None
    adapter_folder: Path | None = None
    adapter_form: str = "none"
    dtype: torch.dtype | None = None
    compute_dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    comm: Communicator = SINGLE_PROCESS
    max_shard_bytes: int = MAX_SHARD_BYTES
    name: str = "model"

    @property
    def merged(self) -> Adapter | None:
        """The adapter to merge."""
        return self.adapter if self.adapter_form == "merge" else None

    @property
    def separate(self) -> Adapter | None:
        """The adapter to write beside the base."""
        return self.adapter if self.adapter_form == "separate" else None

    @property
    def settings_folder(self) -> Path | None:
        """The folder of the adapter, whose generation settings the export gets; None: no adapter.

        A separate adapter counts, too, because other programs read the settings of the base alone,
        and would not stop where the adapter was trained to end its turns.
        """
        return None if self.adapter_form == "none" else self.adapter_folder

    def tensors(self) -> Tensors:
        """Return the stream of the base's tensors; see `model_tensors`. Collective."""
        return model_tensors(self.model, gather=full_tensor)


@dataclass(frozen=True)
class WrittenModel:
    """A model that has been written, but is not yet accepted.

    Attributes:
        format: The name of its format.
        dtype: The dtype of its floating-point tensors; None: they have several.
        comparison: How far its layers are from the quantized ones.
        read_layer: Returns the linear that the other program computes with, without a bias, by the
            name of the module. It reads the files, which get another name once they are accepted.
    """

    format: str
    dtype: torch.dtype | None
    comparison: ExportComparison
    read_layer: Callable[[str], nn.Module]


Accept = Callable[[WrittenModel], None]
"""Raises if the written model is too far from the quantized one. It is then removed. Collective."""


def accept_all(written: WrittenModel) -> None:
    """Accept every written model."""


class ExportFormat(ABC):
    """A format in which a model can be exported.

    Attributes:
        name: The value of `export.format`.
        adapter_forms: The values of `export.adapter` that the format allows beside `none`. The
            first is that of `auto`.
        merges: The end of the message for an adapter that the format does not merge.
        holds_dense: Whether the format can hold a model that has no quantized layers.
        has_tokenizer: Whether its file contains the tokenizer, so that it cannot be added later.
    """

    name: ClassVar[str]
    adapter_forms: ClassVar[tuple[str, ...]] = ("separate",)
    merges: ClassVar[str] = "export.format=dense merges it."
    holds_dense: ClassVar[bool] = False
    has_tokenizer: ClassVar[bool] = False

    def configured(self, config: ExportConfig) -> "ExportFormat":
        """Return the format with the keys of `config` that are its own."""
        return self

    def forms_of(self, settings: QuantizedSettings) -> tuple[str, ...]:
        """Return the `adapter_forms` for a model with these settings."""
        return self.adapter_forms

    @abstractmethod
    def refusals(self, settings: QuantizedSettings, hf_config: PretrainedConfig) -> Iterator[str]:
        """Yield why the format cannot hold a model with these settings; nothing if it can.

        Unless the format `holds_dense`, it is asked only about models with quantized layers.
        """

    @abstractmethod
    def write(self, export: ModelExport, folder: Path, accept: Accept = accept_all) -> None:
        """Write a model to a folder, completely or not at all. Collective.

        Args:
            export: The model.
            folder: The folder to create or replace.
            accept: Called when all files are written, and before the folder gets its name.
        """

    def adapter_form(self, asked: str, adapter: Path | None, settings: QuantizedSettings) -> str:
        """Return what becomes of the adapter: `merge`, `separate` or `none`.

        Args:
            asked: The value of `export.adapter`.
            adapter: The folder of the adapter; None: the model has none.
            settings: The settings of the quantized model.

        Raises:
            UserError: There is no adapter, or the format has no such form.
        """
        if adapter is None:
            if asked in ("merge", "separate"):
                raise UserError(
                    f"export.adapter={asked}: the model has no adapter. Use auto, or name a run "
                    "that has trained one in model.name_or_path, or its adapter in "
                    "adapter.init_from."
                )
            return "none"
        forms = self.forms_of(settings)
        form = forms[0] if asked == "auto" else asked
        if form not in (*forms, "none"):
            raise UserError(
                f"export.adapter={form}: export.format={self.name} allows "
                f"{', '.join((*forms, 'none'))}. An adapter corrects the errors of "
                "its quantized base, and would be lost if the sum were rounded to few bits again; "
                + self.merges
            )
        return form
