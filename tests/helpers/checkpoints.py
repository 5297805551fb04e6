"""Small checkpoints with random tensors."""

from pathlib import Path

import torch
from peft import LoraConfig

from hqqtrain.checkpoint.format import write_checkpoint
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.formats.adapter_base import BaseModelRef

BASE = BaseModelRef("tiny", None, "sha256:00")
ADAPTER_NAMES = [f"base_model.model.layers.0.q_proj.lora_{matrix}.weight" for matrix in "AB"]


def save_checkpoint(store: CheckpointStore, step: int, **state: object) -> Path:
    """Write the checkpoint of `step`; its tensors depend on the step only."""
    torch.manual_seed(step)
    adapter = dict(zip(ADAPTER_NAMES, (torch.randn(4, 16), torch.randn(16, 4)), strict=True))
    optimizer = {f"{n}/{k}": torch.randn_like(t) for n, t in adapter.items() for k in ("m", "v")}
    folder = store.folder(step)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    write_checkpoint(folder, adapter, optimizer, config, BASE, {"step": step, **state})
    return folder
