"""Hostile and broken run directories and adapters."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from hostile import Case, Inputs, edit_json, edit_tensors, nested, replace_by_fifo
from hostile_config import BOMB
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def _again(break_it: Callable[[Path], object]) -> Callable[[Inputs], list[str]]:
    """Return what breaks a finished run, and starts it again with another number of steps."""

    def make(inputs: Inputs) -> list[str]:
        break_it(inputs.run())
        return ["run.name=run", "train.max_steps=2"]

    return make


def _same(break_it: Callable[[Path], object]) -> Callable[[Inputs], list[str]]:
    """Return what breaks a finished run, and gives the command that has made it."""

    def make(inputs: Inputs) -> list[str]:
        break_it(inputs.run())
        return ["run.name=run"]

    return make


def _evaluate(break_it: Callable[[Path], object]) -> Callable[[Inputs], list[str]]:
    """Return what breaks a finished run, and evaluates it."""

    def make(inputs: Inputs) -> list[str]:
        run = inputs.run()
        break_it(run)
        return ["task=eval", f"model.name_or_path={run}"]

    return make


def _adapter(break_it: Callable[[Path], object]) -> Callable[[Inputs], list[str]]:
    """Return what breaks an adapter, and starts a run from it."""

    def make(inputs: Inputs) -> list[str]:
        folder = inputs.adapter()
        break_it(folder)
        return [f"adapter.init_from={folder}"]

    return make


def _settings(**values: object) -> Callable[[Inputs], list[str]]:
    return _adapter(lambda folder: edit_json(folder / CONFIG, **values))


def _checkpoint(run: Path) -> Path:
    return next((run / "checkpoints").glob("step-*"))


def _rename_checkpoint(run: Path) -> None:
    _checkpoint(run).rename(run / "checkpoints" / "step-00000007")


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

RUNS = {
    "config.yaml of aliases": Case(
        _same(lambda r: (r / "config.yaml").write_text(BOMB)), ("config.yaml",)
    ),
    "config.yaml nested": Case(
        _same(lambda r: (r / "config.yaml").write_text("[" * 50_000)), ("config.yaml",)
    ),
    "config.yaml a list": Case(
        _same(lambda r: (r / "config.yaml").write_text("- a")), ("config.yaml",)
    ),
    "config.yaml missing": Case(_same(lambda r: (r / "config.yaml").unlink()), ("runs/run",)),
    "config.yaml a pipe": Case(_same(lambda r: replace_by_fifo(r / "config.yaml")), ("runs/run",)),
    "status.json nested": Case(
        _same(lambda r: (r / "status.json").write_text(nested())), ("status.json",)
    ),
    "status.json a pipe": Case(
        _same(lambda r: replace_by_fifo(r / "status.json")), ("status.json",)
    ),
    "summary.json a list": Case(
        _same(lambda r: (r / "summary.json").write_text("[]")), ("summary.json",)
    ),
    "metrics.jsonl of garbage": Case(
        _again(lambda r: (r / "metrics.jsonl").write_text("{]\n" * 9))
    ),
    "no adapter": Case(_evaluate(lambda r: shutil.rmtree(r / "adapter")), ("adapter",)),
    "adapter of garbage": Case(
        _evaluate(lambda r: (r / "adapter" / TENSORS).write_text("x")), (TENSORS,)
    ),
    "no quantized": Case(_evaluate(lambda r: shutil.rmtree(r / "quantized")), ("quantized",)),
    "quantized cut": Case(_evaluate(lambda r: _cut(r / "quantized")), ("quantized",)),
    "a checkpoint of another step": Case(_again(_rename_checkpoint), ("step-00000007",)),
    "a checkpoint of garbage": Case(
        _again(lambda r: (_checkpoint(r) / "state.json").write_text(nested())), ("checkpoint",)
    ),
    "the directory is a file": Case(
        _same(lambda r: (shutil.rmtree(r), r.write_text("x"))), ("runs/run",)
    ),
    "the lock is a link": Case(
        _same(lambda r: ((r / ".lock").unlink(), (r / ".lock").symlink_to("/etc/passwd"))),
        (".lock",),
    ),
}


def _cut(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])


ADAPTERS = {
    "missing": Case(["adapter.init_from=./nowhere"], ("adapter.init_from", "nowhere")),
    "empty folder": Case(_adapter(lambda f: (shutil.rmtree(f), f.mkdir())), (CONFIG,)),
    "settings of garbage": Case(_adapter(lambda f: (f / CONFIG).write_text("x")), (CONFIG,)),
    "settings a list": Case(_adapter(lambda f: (f / CONFIG).write_text("[]")), (CONFIG,)),
    "settings nested": Case(_adapter(lambda f: (f / CONFIG).write_text(nested())), (CONFIG,)),
    "settings a pipe": Case(_adapter(lambda f: replace_by_fifo(f / CONFIG)), (CONFIG,)),
    "another kind": Case(_settings(peft_type="IA3"), ("peft_type", "IA3")),
    "DoRA": Case(_settings(use_dora=True), ("use_dora",)),
    "modules_to_save": Case(_settings(modules_to_save=["lm_head"]), ("modules_to_save",)),
    "rank negative": Case(_settings(r=-4), ("r=-4",)),
    "rank huge": Case(_settings(r=10**12), ("r",)),
    "no tensors": Case(_adapter(lambda f: (f / TENSORS).unlink()), (TENSORS,)),
    "tensors of garbage": Case(_adapter(lambda f: (f / TENSORS).write_text("x")), (TENSORS,)),
    "a tensor is missing": Case(
        _adapter(lambda f: edit_tensors(f / TENSORS, lambda t: t.pop(min(t)))), (TENSORS,)
    ),
    "a tensor too many": Case(
        _adapter(lambda f: edit_tensors(f / TENSORS, lambda t: t.update(x=torch.ones(2)))), ("x",)
    ),
    "a tensor of another shape": Case(
        _adapter(lambda f: edit_tensors(f / TENSORS, lambda t: t.update({min(t): torch.ones(2)}))),
        ("lora_A",),
    ),
    "NaN": Case(
        _adapter(lambda f: edit_tensors(f / TENSORS, lambda t: t[min(t)].fill_(float("nan")))),
        ("NaN",),
    ),
    "of another model": Case(_adapter(lambda f: _other_base(f)), ("trained on the base",)),
}


def _other_base(folder: Path) -> None:
    """Give the adapter the fingerprint of another base."""
    with safe_open(folder / TENSORS, "pt") as file:
        metadata = {key: re.sub("[0-9a-f]{64}", "0" * 64, v) for key, v in file.metadata().items()}
    (folder / "manifest.json").unlink(missing_ok=True)
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata)
