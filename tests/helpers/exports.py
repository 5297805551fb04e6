"""Export small trained models, and read what was written."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hqqtrain.formats.base import ModelExport, WrittenModel
from hqqtrain.formats.exported_model import exported_model
from hqqtrain.formats.registry import FORMATS
from hqqtrain.nn.hqq_linear import HQQLinear

WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Sizes that groups of 32 and 64 divide, unlike those of the other small models."""

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def make_wide(make_trained) -> Callable:
    """Return `make_trained` for models whose rows have whole groups of 64."""
    return partial(make_trained, sizes=WIDE)


def model_export(trained, **changes) -> ModelExport:
    facts = {"model": trained.model, "settings": trained.settings, "hf_config": trained.hf_config,
             "tokenizer": trained.source, "source_dtype": lambda name: None,
             "adapter": trained.adapter, "adapter_folder": trained.source}  # fmt: skip
    return ModelExport(**facts | changes)


def write_export(trained, name: str, folder: Path, **changes) -> WrittenModel:
    """Write an export and return what the format says about it."""
    found: list[WrittenModel] = []
    FORMATS[name].write(model_export(trained, **changes), folder, found.append)
    return found[0]


def logits_of_export(trained, name: str, folder: Path, merged=(), **changes) -> torch.Tensor:
    """Write an export and return the logits of the model that its files describe."""
    found: list[torch.Tensor] = []

    def accept(written: WrittenModel) -> None:
        model = exported_model(trained.model, written.read_layer, merged)
        norm = "base_model.model.model.norm"
        assert model.get_submodule(norm).weight is trained.model.get_submodule(norm).weight
        found.append(model(TOKENS).logits)

    FORMATS[name].write(model_export(trained, **changes), folder, accept)
    return found[0]


def layers(trained) -> dict[str, HQQLinear]:
    """Return the quantized layers of a model by their names in the checkpoint."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in trained.model.named_modules()
        if isinstance(module, HQQLinear)
    }


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
