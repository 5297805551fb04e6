"""A full disk: training continues without a checkpoint, and a run that must stop reports it."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from disk import limit_file_size
from runs import SMALL, run_in_this_process, small_data

from hqqtrain.checkpoint.format import read_checkpoint, write_checkpoint
from hqqtrain.formats.peft import save_adapter
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.training.trainer import Trainer

_write_status = RunDirectory.write_status


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    fixed = ("run.name=run", "train.max_steps=6", "ckpt.every=2", "eval.source=null")
    return [*SMALL, *small_data(tmp_path), *fixed, f"run.root={tmp_path}"]


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    def write(folder: Path, *rest: Any) -> None:
        if int(folder.name.removeprefix("step-")) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_checkpoint(folder, *rest)

    monkeypatch.setattr("hqqtrain.checkpoint.manager.write_checkpoint", write)


def test_training_continues(words: list[str], tmp_path: Path, monkeypatch, capsys):
    full_at(monkeypatch, 4)
    assert run_in_this_process(words) == 0
    errors = capsys.readouterr().err
    assert "checkpoint of step 4 was not written ([Errno 28] No space left on device)" in errors
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [read_checkpoint(folder).step for folder in kept] == [2, 6]


def test_a_run_that_must_stop_reports_that_nothing_was_saved(
    words: list[str], tmp_path: Path, monkeypatch, capsys
):
    full_at(monkeypatch, 3)
    step = Trainer.step

    def signaled(self: Trainer) -> Any:
        if self.state.next_batch_index == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self)

    monkeypatch.setattr(Trainer, "step", signaled)
    assert run_in_this_process(words) == 2
    assert "the checkpoint of step 3 was not written" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert run_in_this_process(words) == 0


def test_a_result_without_disk_space_is_reported_and_the_same_command_resumes(
    words: list[str], tmp_path: Path, monkeypatch, capsys
):
    def without_room(*rest: Any, **more: Any) -> None:
        with limit_file_size(4096):
            save_adapter(*rest, **more)

    monkeypatch.setattr("hqqtrain.tasks.finetune.save_adapter", without_room)
    monkeypatch.setattr(RunDirectory, "write_status", _only_while_it_runs)
    assert run_in_this_process(words) == 2
    errors = capsys.readouterr().err
    assert f"run.root={tmp_path}: the disk is full" in errors
    assert "status.json was not written" in errors
    monkeypatch.undo()
    assert run_in_this_process(words) == 0
    assert "resuming from" in capsys.readouterr().err


def _only_while_it_runs(self: RunDirectory, status: str, **more: Any) -> None:
    if status != "running":
        raise OSError(errno.ENOSPC, "No space left on device")
    _write_status(self, status, **more)
