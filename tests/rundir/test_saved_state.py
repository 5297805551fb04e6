"""The message of a stop says what was saved, and what the same command does then."""

from pathlib import Path

import pytest

from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.saved_state import resume_advice


def _config(root: Path, task: str = "finetune", resume: str = "auto") -> RunConfig:
    return RunConfig(task=task, run=RunDirConfig(root=str(root), name="mine", resume=resume))


@pytest.mark.parametrize("task", ["finetune", "quantize", "eval", "export", "data"])
def test_without_a_directory_nothing_was_saved(tmp_path: Path, task: str):
    advice = "nothing was saved, and the same command starts from the beginning"
    assert resume_advice(_config(tmp_path, task)) == advice
    (tmp_path / "mine" / "checkpoints" / ".step-00000003.partial").mkdir(parents=True)
    (tmp_path / "mine" / "checkpoints" / "step-00000000").mkdir()
    assert resume_advice(_config(tmp_path, task)) == advice


def test_the_last_step_or_the_quantized_model_is_named(tmp_path: Path):
    (tmp_path / "mine" / "quantized").mkdir(parents=True)
    (tmp_path / "mine" / "quantized" / "config.json").write_text("{}")
    assert resume_advice(_config(tmp_path)).startswith("no step is saved, but the quantized model")
    for step in (3, 12):
        (tmp_path / "mine" / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    assert resume_advice(_config(tmp_path)) == (
        "step 12 is saved: run the same command again to resume"
    )
    assert "with run.resume=auto to resume" in resume_advice(_config(tmp_path, resume="never"))
    assert resume_advice(_config(tmp_path, "eval")).startswith("nothing was saved")


def test_a_complete_run_that_was_pushing(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "status.json").write_text('{"status": "done"}')
    config = _config(tmp_path, "quantize")
    config.hub.push = "alice/model"
    advice = "the run is complete: run the same command again to push what the hub still lacks"
    assert resume_advice(config) == advice
