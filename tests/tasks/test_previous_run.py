"""Whether a run begins anew, and what it leaves of the one before."""

from pathlib import Path

import pytest

from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.tasks.previous_run import PreviousRun
from hqqtrain.tracking.wandb_run_id import keep_run_id, run_id


def _config(root: Path, resume: str) -> RunConfig:
    return RunConfig(run=RunDirConfig(root=str(root), name="run", resume=resume))


def _history(config: RunConfig) -> PreviousRun:
    directory = RunDirectory(config)
    return PreviousRun(
        directory, CheckpointStore(directory.path / "checkpoints", 2), SINGLE_PROCESS
    )


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """By job 7 of slurm."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with RunDirectory(_config(tmp_path, "auto")) as directory:
        directory.begin(["hqqtrain"])
        directory.write_summary({"schema": 1})
        directory.write_status("done", exit_code=0)
    return directory


@pytest.mark.parametrize(
    ("resume", "job", "anew"),
    [("never", "8", True), ("never", None, True), ("never", "7", False), ("auto", "8", False)],
)
def test_never_is_over_once_this_very_job_has_begun(
    finished, tmp_path, monkeypatch, resume: str, job: str | None, anew: bool
):
    """A job that was requeued before it had begun, has not."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID")
    history = _history(_config(tmp_path, resume))
    assert history.starts_over is anew
    assert history.is_done() is not anew


def test_nothing_is_left_that_would_be_taken_for_the_new_run(finished, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    folder = finished.path
    for name in ("adapter", "nonfinite", "report", "checkpoints/step-00000001", "quantized"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    keep_run_id(folder, "abc")
    _history(_config(tmp_path, "auto")).forget()
    assert run_id(folder) == "abc"
    history = _history(_config(tmp_path, "never"))
    history.forget()
    assert run_id(folder) is None
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {"config.yaml", "status.json", "quantized", "wandb"}
    assert not history.has_quantized()
    assert not _history(_config(tmp_path, "auto")).was_finished()
