"""Checkpoints are read back exactly, and damaged ones are refused."""

import json
import random
import resource
from pathlib import Path

import pytest
import torch
from checkpoints import ADAPTER_NAMES, save_checkpoint

from hqqtrain.checkpoint.format import read_checkpoint
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.formats.manifest import DamagedError
from hqqtrain.formats.peft import load_adapter


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_a_checkpoint_round_trips_and_is_a_peft_adapter(store: CheckpointStore):
    folder = save_checkpoint(store, 7, eval_loss=float("nan"))
    found = read_checkpoint(folder)
    assert (found.step, found.state["eval_loss"]) == (7, None)
    torch.manual_seed(7)
    assert torch.equal(load_adapter(folder).state[ADAPTER_NAMES[0]], torch.randn(4, 16))
    assert load_adapter(folder).fingerprint == "sha256:00"
    assert set(found.optimizer()) == {f"{n}/{k}" for n in ADAPTER_NAMES for k in ("m", "v")}
    assert found.parameters().keys() == set(ADAPTER_NAMES)
    assert not list(store.root.glob(".*"))


def test_every_changed_or_missing_byte_is_detected(store: CheckpointStore, tmp_path: Path):
    folder = save_checkpoint(store, 3)
    chance, cases = random.Random(0), 0
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        step = max(1, len(whole) // 40)
        for start in range(0, len(whole), step):
            at = min(len(whole) - 1, start + chance.randrange(step))
            flipped = whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :]
            for damaged in (flipped, whole[:at], whole + b"x"):
                file.write_bytes(damaged)
                with pytest.raises(DamagedError, match=str(folder)):
                    read_checkpoint(folder)
                cases += 1
        file.unlink()
        with pytest.raises(DamagedError, match="cannot be read"):
            read_checkpoint(folder)
        file.write_bytes(whole)
    assert cases > 500
    assert read_checkpoint(folder).step == 3


def test_an_unknown_format_is_refused(store: CheckpointStore, monkeypatch):
    monkeypatch.setattr("hqqtrain.checkpoint.format.FORMAT", 99)
    folder = save_checkpoint(store, 1)
    monkeypatch.undo()
    with pytest.raises(DamagedError, match="format 99, this version reads 1"):
        read_checkpoint(folder)


@pytest.mark.parametrize("room", [0, 300, 1200])
def test_a_full_disk_leaves_the_previous_checkpoint(store: CheckpointStore, room: int):
    save_checkpoint(store, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(store, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in store.root.iterdir()] == ["step-00000010"]
    found = store.newest_intact()
    assert found is not None
    assert found.step == 10


def test_the_manifest_is_readable(store: CheckpointStore):
    files = json.loads((save_checkpoint(store, 1) / "manifest.json").read_text())["files"]
    assert set(files) == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip
