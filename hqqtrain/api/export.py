"""`export`: write a quantized model for another program."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from hqqtrain.api.arguments import checked_group, named_as_arguments
from hqqtrain.api.evaluation import single_process
from hqqtrain.api.folders import (
    companions,
    dense_config,
    load_quantized,
    new_folder,
    quantized_source,
    transformers_model,
    whole_settings,
)
from hqqtrain.common.errors import UserError
from hqqtrain.config.export import ExportConfig
from hqqtrain.config.public_function import public_function
from hqqtrain.formats.base import ModelExport, WrittenModel
from hqqtrain.formats.comparison import ExportComparison
from hqqtrain.formats.peft import load_adapter
from hqqtrain.formats.registry import FORMATS, check_format
from hqqtrain.quant.spec import DTYPES


@public_function(model=(nn.Module, str, os.PathLike), tokenizer=PreTrainedTokenizerBase)
def export(
    model: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    format: str = "dense",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    adapter: str = "auto",
    dtype: str = "auto",
    gguf_type: str = "auto",
    llama_cpp: str | os.PathLike[str] | None = None,
    max_error: float | None = None,
    overwrite: bool = False,
) -> ExportComparison:
    """Write a quantized model in a format of `export.format`, read it back, and compare it.

    The KL divergence of the export is not measured: `task=export` does that.

    Args:
        model: A quantized model in memory, with or without an adapter; or what `load_quantized`
            takes as a folder.
        folder: The folder to create.
        format: The name of the format, such as `dense`, `hqq` or `humming` (docs/exports.md).
        tokenizer: The tokenizer of a model in memory, to save with it.
        adapter: What becomes of the adapter: `auto`, `merge`, `separate` or `none`.
        dtype: The dtype of dense weights: `auto`, `fp32`, `bf16` or `fp16`.
        gguf_type: The type of the weights in a GGUF file, a value of `export.gguf_type`.
        llama_cpp: The folder of llama.cpp, as for `export.llama_cpp`.
        max_error: The largest error of a weight in steps of its group; None: any.
        overwrite: Whether the folder may have a model. All that is in it is then deleted.

    Returns:
        How far each layer is from the quantized one.

    Raises:
        UserError: The format cannot hold the model, it is further off than `max_error`, or the
            folder exists.
    """
    with named_as_arguments("export"):
        values = {"format": format, "adapter": adapter, "dtype": dtype, "gguf_type": gguf_type,
                  "llama_cpp": llama_cpp, "max_error": max_error}  # fmt: skip
        settings = checked_group(ExportConfig, "export", values)
        check = _Check(settings.max_error)
        is_module = isinstance(model, nn.Module)
        if is_module and tokenizer is None and FORMATS[settings.format].has_tokenizer:
            raise UserError(f"tokenizer=None: a file of format={format} contains it; give the "
                            "tokenizer of the model.")  # fmt: skip
        with new_folder(folder, overwrite=overwrite) as path:
            if isinstance(model, nn.Module):
                with companions(transformers_model(model), tokenizer) as files:
                    _write(model, files, path, settings, check)
            else:
                files = quantized_source(model).tokenizer
                _write(load_quantized(model), files, path, settings, check)
        return check.comparison


@dataclass
class _Check:
    """Checks what was written, and keeps the comparison."""

    max_error: float | None
    comparison: ExportComparison = field(default_factory=lambda: ExportComparison(()))

    def __call__(self, written: WrittenModel) -> None:
        self.comparison = written.comparison
        self.comparison.check(self.max_error)


def _write(
    model: nn.Module, files: Path, path: Path, settings: ExportConfig, check: _Check
) -> None:
    """Write a model with the companion files in `files`."""
    base, target = transformers_model(model), FORMATS[settings.format].configured(settings)
    of_model = whole_settings(base)
    if not of_model.modules:
        raise UserError("model has no quantized layer; call quantize_model first.")
    hf_config = dense_config(base)
    check_format(settings.format, of_model, hf_config, settings)
    with _adapter_folder(model) as saved:
        target.write(
            ModelExport(
                model=model,
                settings=of_model,
                hf_config=hf_config,
                tokenizer=files,
                source_dtype=lambda _: None,
                adapter=load_adapter(saved) if saved else None,
                adapter_folder=saved,
                adapter_form=target.adapter_form(settings.adapter, saved, of_model),
                dtype=DTYPES.get(settings.dtype),
                compute_dtype=base.dtype,
                device=single_process(model).device,
                name=Path(base.name_or_path).name or path.name,
            ),
            path,
            check,
        )


@contextmanager
def _adapter_folder(model: Any) -> Iterator[Path | None]:
    """Yield a temporary folder with the active adapter of a model; None if it has none."""
    if not isinstance(model, PeftModel):
        yield None
        return
    with TemporaryDirectory(prefix="hqqtrain-") as folder:
        active = model.active_adapter
        model.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
        yield Path(folder) if active == "default" else Path(folder, active)
