"""The folder of checkpoints: the newest undamaged one, partial folders, and those to keep."""

import shutil
from pathlib import Path

import pytest
from checkpoints import save_checkpoint

from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.errors import UserError
from hqqtrain.formats.manifest import seal


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_the_checkpoint_before_a_damaged_one_is_used(store: CheckpointStore, caplog):
    save_checkpoint(store, 10)
    (save_checkpoint(store, 20) / "optimizer.safetensors").write_bytes(b"")
    found = store.newest_intact()
    assert found is not None
    assert found.step == 10
    assert "step-00000020" in caplog.text
    save_checkpoint(store, 20)
    for step in (10, 20):
        (store.folder(step) / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint can be used: .*20.*10.*run\.resume=never"):
        store.newest_intact()


def test_damaged_checkpoints_do_not_count_as_kept(store: CheckpointStore):
    save_checkpoint(store, 10)
    for step in (20, 30):
        (save_checkpoint(store, step) / "state.json").write_text("{}")
    assert store.newest_intact().step == 10  # type: ignore[union-attr]
    assert store.steps() == [10]
    save_checkpoint(store, 15)
    store.prune()
    assert store.steps() == [10, 15]
    assert len(list(store.root.glob("damaged-step-*"))) == 2


def test_partial_folders_are_not_checkpoints(store: CheckpointStore):
    assert store.newest_intact() is None
    folder = save_checkpoint(store, 10)
    shutil.copytree(folder, store.root / ".step-00000020.partial")
    shutil.copytree(folder, store.root / ".step-00000005.going")
    assert store.steps() == [10]
    save_checkpoint(store, 20)
    assert store.steps() == [10, 20]
    store.delete_partial()
    assert not list(store.root.glob(".*"))


def test_prune_keeps_the_last_and_the_best(store: CheckpointStore):
    store.keep_best = 2
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 2.0, 6: 3.0, 7: None}
    for step, loss in losses.items():
        save_checkpoint(store, step, eval_loss=loss)
    store.prune()
    assert store.steps() == [2, 5, 6, 7]
    store.keep_best, store.keep_last = 0, 1
    store.prune()
    assert store.steps() == [7]
    store.keep_last = 0
    store.prune()
    assert store.steps() == []
    store.delete_all()
    assert store.newest_intact() is None
    assert not store.root.exists()


def test_a_renamed_checkpoint_is_not_that_of_another_step(store: CheckpointStore, caplog):
    save_checkpoint(store, 10)
    save_checkpoint(store, 20).rename(store.folder(30))
    found = store.newest_intact()
    assert found is not None
    assert found.step == 10
    assert "step-00000030: is the checkpoint of step 20, renamed or copied" in caplog.text


@pytest.mark.parametrize(
    "state",
    ["[]", "5", "[" * 100_000, '{"format": 1}', '{"format": 1, "step": "1"}',
     '{"format": 1, "step": 10, "record": 5}', '{"format": 1, "step": 10, "texts": []}'],
)  # fmt: skip
def test_a_sealed_folder_with_another_state_is_damaged(store: CheckpointStore, state: str):
    folder = save_checkpoint(store, 10)
    (folder / "state.json").write_text(state)
    (folder / "manifest.json").unlink()
    seal(folder)
    with pytest.raises(UserError, match="no checkpoint can be used"):
        store.newest_intact()
    store.keep_best = 1
    store.prune()


def test_a_linked_checkpoint_is_deleted_and_its_target_kept(store: CheckpointStore, tmp_path: Path):
    save_checkpoint(store, 10).rename(tmp_path / "elsewhere")
    store.folder(10).symlink_to(tmp_path / "elsewhere")
    store.keep_last = 0
    store.prune()
    assert store.steps() == []
    assert (tmp_path / "elsewhere" / "state.json").is_file()


def test_the_best_intact_checkpoint_is_found(store: CheckpointStore, caplog):
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 2.0)):
        save_checkpoint(store, step, eval_loss=loss)
    assert store.best_intact(below=9.0).step == 20  # type: ignore[union-attr]
    assert store.best_intact(below=1.0) is None
    (store.folder(20) / "adapter_model.safetensors").write_bytes(b"")
    assert store.best_intact(below=9.0).step == 50  # type: ignore[union-attr]
    assert "step-00000020" in caplog.text
    assert store.best_intact(below=2.0) is None
