"""Checkpoints are read back exactly, and damaged ones are refused."""

import json
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from hqqtrain.ckpt import (
    Base,
    CheckpointStore,
    DamagedError,
    load_adapter,
    read_checkpoint,
    write_checkpoint,
)
from hqqtrain.config import UserError

BASE = Base("tiny", None, "sha256:00")
NAMES = [f"base_model.model.layers.0.q_proj.lora_{x}.weight" for x in "AB"]


def save(store: CheckpointStore, step: int, **state: object) -> Path:
    torch.manual_seed(step)
    adapter = dict(zip(NAMES, (torch.randn(4, 16), torch.randn(16, 4)), strict=True))
    optimizer = {f"{n}/{k}": torch.randn_like(t) for n, t in adapter.items() for k in ("m", "v")}
    folder = store.folder(step)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    write_checkpoint(folder, adapter, optimizer, config, BASE, {"step": step, **state})
    return folder


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_a_checkpoint_round_trips_and_is_a_peft_adapter(store: CheckpointStore):
    folder = save(store, 7, eval_loss=float("nan"))
    found = read_checkpoint(folder)
    assert (found.step, found.state["eval_loss"]) == (7, None)
    torch.manual_seed(7)
    assert torch.equal(load_adapter(folder).state[NAMES[0]], torch.randn(4, 16))
    assert load_adapter(folder).fingerprint == "sha256:00"
    assert set(found.optimizer()) == {f"{n}/{k}" for n in NAMES for k in ("m", "v")}
    assert not list(store.root.glob(".*"))


def test_every_changed_or_missing_byte_is_detected(store: CheckpointStore, tmp_path: Path):
    folder = save(store, 3)
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


def test_the_checkpoint_before_a_damaged_one_is_used(store: CheckpointStore, caplog):
    save(store, 10)
    (save(store, 20) / "optimizer.safetensors").write_bytes(b"")
    found = store.newest()
    assert found is not None
    assert found.step == 10
    assert "step-00000020" in caplog.text
    save(store, 20)
    for step in (10, 20):
        (store.folder(step) / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint can be used: .*20.*10.*run\.resume=never"):
        store.newest()


def test_damaged_checkpoints_do_not_count_as_kept(store: CheckpointStore):
    save(store, 10)
    for step in (20, 30):
        (save(store, step) / "state.json").write_text("{}")
    assert store.newest().step == 10  # type: ignore[union-attr]
    assert store.steps() == [10]
    save(store, 15)
    store.prune()
    assert store.steps() == [10, 15]
    assert len(list(store.root.glob("damaged-step-*"))) == 2


def test_partial_folders_are_not_checkpoints(store: CheckpointStore):
    assert store.newest() is None
    folder = save(store, 10)
    shutil.copytree(folder, store.root / ".step-00000020.partial")
    shutil.copytree(folder, store.root / ".step-00000005.going")
    assert store.steps() == [10]
    save(store, 20)
    assert store.steps() == [10, 20]
    store.tidy()
    assert not list(store.root.glob(".*"))


def test_an_unknown_format_is_refused(store: CheckpointStore, monkeypatch):
    monkeypatch.setattr("hqqtrain.ckpt.checkpoint.FORMAT", 99)
    folder = save(store, 1)
    monkeypatch.undo()
    with pytest.raises(DamagedError, match="format 99, this version reads 1"):
        read_checkpoint(folder)


def test_prune_keeps_the_last_and_the_best(store: CheckpointStore):
    store.keep_best = 2
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 2.0, 6: 3.0, 7: None}
    for step, loss in losses.items():
        save(store, step, eval_loss=loss)
    store.prune()
    assert store.steps() == [2, 5, 6, 7]
    store.keep_best, store.keep_last = 0, 1
    store.prune()
    assert store.steps() == [7]
    store.clear()
    assert store.newest() is None
    assert not store.root.exists()


@pytest.mark.parametrize("room", [0, 300, 1200])
def test_a_full_disk_leaves_the_previous_checkpoint(store: CheckpointStore, room: int):
    save(store, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(store, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in store.root.iterdir()] == ["step-00000010"]
    found = store.newest()
    assert found is not None
    assert found.step == 10


def test_the_manifest_is_readable(store: CheckpointStore):
    files = json.loads((save(store, 1) / "manifest.json").read_text())["files"]
    assert set(files) == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip
