"""Whether a run resumes, and from where: what is refused, and what starts at step 0."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_checkpoint

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.resume import check_resumable, find_checkpoint, load_latest
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS

FACTS = {"strategy": "single", "world_size": 1}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def find(store: CheckpointStore, **options: Any) -> Checkpoint | None:
    options = {"must_exist": False, "has_finished_run": lambda: False} | options
    return find_checkpoint(store, SINGLE_PROCESS, **options)


def test_an_empty_store_starts_at_step_0(store: CheckpointStore):
    assert find(store) is None
    assert load_latest(store, SINGLE_PROCESS) is None


def test_an_empty_store_is_refused_where_a_checkpoint_is_expected(store: CheckpointStore):
    with pytest.raises(UserError, match=r"run\.resume=must: .* has no checkpoint"):
        find(store, must_exist=True)
    with pytest.raises(UserError, match="has a finished run, and no checkpoint"):
        find(store, has_finished_run=lambda: True)


def test_the_newest_checkpoint_is_found(store: CheckpointStore):
    save_checkpoint(store, 3, **FACTS)
    save_checkpoint(store, 7, **FACTS)
    found = find(store, must_exist=True, has_finished_run=lambda: True)
    assert found is not None
    assert found.step == 7


def test_a_checkpoint_of_step_0_has_nothing_to_restore(store: CheckpointStore):
    save_checkpoint(store, 0, **FACTS)
    assert find(store, must_exist=True) is None


def test_partial_folders_are_deleted(store: CheckpointStore):
    save_checkpoint(store, 3, **FACTS)
    (store.root / ".step-00000009.partial").mkdir()
    assert find(store) is not None
    assert [path.name for path in store.root.iterdir()] == ["step-00000003"]


def test_other_text_and_fewer_steps_are_refused(store: CheckpointStore):
    digests = {"data.source": "1", "eval.source": "2"}
    save_checkpoint(store, 5, **FACTS, texts=digests)
    found = store.newest_intact()
    check_resumable(found, digests, total_steps=5)
    check_resumable(None, {}, total_steps=0)
    with pytest.raises(UserError, match=r"other text than eval\.source gives now"):
        check_resumable(found, digests | {"eval.source": "3"}, total_steps=5)
    with pytest.raises(UserError, match=r"has 5 steps, but train\.max_steps or epochs ask for 4"):
        check_resumable(found, digests, total_steps=4)
