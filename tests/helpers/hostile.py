"""Small inputs that are right, which cases of hostile or broken input break."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain import models

TINY = Path(models.__file__).parent / "tiny"
WORDS = (
    "recipe=tiny_2bit", "quant.group_size=16", "quant.calibration=null",
    "train.max_steps=1", "train.global_batch_size=2",
    "train.micro_batch_size=1", "train.max_seq_len=32", "eval.tokens=64", "eval.reference=off",
    "eval.samples=0",    "optim.warmup_steps=0", "track.backends=[]",
)  # fmt: skip
"""A run of a second on a model with two narrow layers."""


class Case(NamedTuple):
    """One input: how to make it, and what the command must say about it."""

    make: "Callable[[Inputs], list[str]] | list[str]"
    """Breaks something and returns the words of the command that uses it, or these words."""
    expected: tuple[str, ...] = ()
    """Words of the one message. Without them, the command must succeed."""


@dataclass(frozen=True)
class Inputs:
    """The inputs that are right. A case may change everything below `folder`."""

    folder: Path
    prepared: Path
    """Folder with `model/`, the texts and `runs/run`, which belong to all cases."""

    @property
    def words(self) -> list[str]:
        """Return the words of a run whose model and texts are right."""
        return [
            *WORDS, f"model.name_or_path={self.prepared / 'model'}",
            f"data.source={self.prepared / 'text.txt'}",
            f"eval.source={self.prepared / 'held_out.txt'}",
        ]  # fmt: skip

    def model(self) -> Path:
        """Return a copy of the model."""
        return Path(shutil.copytree(self.prepared / "model", self.folder / "model"))

    def run(self) -> Path:
        """Return a copy of a finished run, made by `words` with run.name=run."""
        return Path(shutil.copytree(self.prepared / "runs" / "run", self.folder / "runs" / "run"))

    def adapter(self) -> Path:
        """Return a copy of the adapter of a finished run."""
        adapter = self.prepared / "runs" / "run" / "adapter"
        return Path(shutil.copytree(adapter, self.folder / "adapter"))


def sample_text(seed: int) -> str:
    """Return some documents of words that a tokenizer splits well."""
    generator = torch.Generator().manual_seed(seed)
    words = ("def", "return", "value", "for", "in", "range", "print", "self", "index", "total")
    lines = (
        " ".join(words[i] for i in torch.randint(10, (12,), generator=generator).tolist())
        for _ in range(200)
    )
    return "\n".join(lines)


def save_texts(folder: Path) -> None:
    """Write the text to train on and the held-out text."""
    (folder / "text.txt").write_text(sample_text(0))
    (folder / "held_out.txt").write_text(sample_text(1))


def save_model(folder: Path) -> None:
    """Write a Llama with two narrow layers and the bundled tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)


def edit_json(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; `...` removes a key."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def nested(depth: int = 100_000) -> str:
    """Return JSON that is nested more deeply than any parser follows."""
    return "[" * depth + "]" * depth


def replace_by_fifo(file: Path) -> None:
    """Replace a file by a pipe that nobody writes to, so that its reader waits for ever."""
    file.unlink(missing_ok=True)
    os.mkfifo(file)
