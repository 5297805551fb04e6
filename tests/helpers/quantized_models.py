"""Fixtures: small random models, quantized and with adapters, and their source checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.formats.packed import fingerprinted, model_tensors, save_quantized
from hqqtrain.formats.peft import Adapter, write_adapter
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.models.fqn import base_model
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model


@dataclass
class TrainedModel:
    """A quantized random model, whose LoRA adapter has a nonzero B as after training."""

    source: Path
    model: torch.nn.Module
    settings: QuantizedSettings
    adapter: Adapter

    @property
    def hf_config(self):
        return base_model(self.model).config

    def save_adapter(self, folder: Path, base: str = "owner/name") -> Path:
        folder.mkdir(parents=True)
        is_quantized = bool(self.settings.modules)
        ref = BaseModelRef(base, None, self.settings.fingerprint, is_quantized)
        write_adapter(folder, self.adapter.state, self.adapter.config, ref)
        return folder

    def save(self, folder: Path, **more) -> Path:
        tensors = model_tensors(self.model)
        save_quantized(
            tensors, folder, hf_config=self.hf_config, settings=self.settings, source=self.source,
            **more,
        )  # fmt: skip
        return folder


def trained_model(
    model: torch.nn.Module, source: Path, adapter: AdapterConfig | None = None,
    storage: torch.dtype = torch.uint8, **quant,
) -> TrainedModel:  # fmt: skip
    """Save a model to `source` with a tokenizer, quantize it, and add an adapter."""
    model.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((TINY_FOLDER / name).read_bytes())
    quantize_model(
        model, QuantConfig(**{"nbits": 2, "group_size": 16} | quant), storage_dtype=storage
    )
    config = lora_config(adapter or AdapterConfig(r=4, alpha=8), model)
    model = get_peft_model(model, config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.2)
    settings = fingerprinted(model)
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    return TrainedModel(
        source, model.eval(), settings, Adapter(config, state, settings.fingerprint)
    )


@pytest.fixture
def make_trained(make_model, tmp_path) -> Callable[..., TrainedModel]:
    """Return a function that makes a `TrainedModel` and saves its dense source and a tokenizer."""

    def make(kind: str = "llama", *, tied: bool = False, adapter: AdapterConfig | None = None,
             storage: torch.dtype = torch.uint8, sizes: dict | None = None,
             **quant) -> TrainedModel:  # fmt: skip
        model = make_model(kind, tie_word_embeddings=tied, **sizes or {})
        return trained_model(model, tmp_path / "source", adapter, storage, **quant)

    return make
