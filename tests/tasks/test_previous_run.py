"""Whether a run starts from scratch, and what it deletes of the previous run."""

from pathlib import Path

import pytest

from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.tasks.previous_run import PreviousRun
from hqqtrain.tracking.wandb import read_run_id, save_run_id


def _config(root: Path, resume: str) -> RunConfig:
    return RunConfig(run=RunDirConfig(root=str(root), name="run", resume=resume))


def _history(config: RunConfig) -> PreviousRun:
    directory = RunDirectory(config)
    return PreviousRun(
        directory, CheckpointStore(directory.path / "checkpoints", 2), SINGLE_PROCESS
    )


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Return a run directory that slurm job 7 has finished."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with RunDirectory(_config(tmp_path, "auto")) as directory:
        directory.begin(["hqqtrain"])
        directory.write_summary({"schema": 1})
        directory.write_status("done", exit_code=0)
    return directory


@pytest.mark.parametrize(
    ("resume", "job", "from_scratch"),
    [("never", "8", True), ("never", None, True), ("never", "7", False), ("auto", "8", False)],
)
def test_resume_never_does_not_apply_to_a_requeued_job(
    finished, tmp_path, monkeypatch, resume: str, job: str | None, from_scratch: bool
):
    """Job 7 has begun before it was requeued; job 8 was requeued before it began."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID")
    history = _history(_config(tmp_path, resume))
    assert history.starts_over is from_scratch
    assert history.is_done() is not from_scratch


def test_results_of_the_previous_run_are_deleted(finished, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    folder = finished.path
    for name in ("adapter", "nonfinite", "report", "checkpoints/step-00000001", "quantized"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    save_run_id(folder, "abc")
    _history(_config(tmp_path, "auto")).delete_results()
    assert read_run_id(folder) == "abc"
    history = _history(_config(tmp_path, "never"))
    history.delete_results()
    assert read_run_id(folder) is None
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {"config.yaml", "status.json", "quantized", "wandb"}
    assert not history.has_quantized("sha256:00")
    assert not _history(_config(tmp_path, "auto")).has_finished_run()
