"""Results of a finished run that were deleted, edited, or replaced by those of another run."""

import json
import shutil
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.results import missing_results, recorded_results

FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors",
         "quantized/manifest.json", "export/config.json")  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    config = RunConfig(run=RunDirConfig(root=str(tmp_path), name="run"))
    with RunDirectory(config) as run:
        run.begin([])
        for name in FILES:
            (run.path / name).parent.mkdir(exist_ok=True)
            (run.path / name).write_text(name)
        (run.path / "adapter" / "README.md").write_text("a card")
        run.write_summary({"schema": 1, "train": {"steps": 1}})
        run.write_status("done", exit_code=0)
    return run


def test_the_results_are_recorded_when_the_run_is_done(finished: RunDirectory):
    assert set(recorded_results(finished.layout)) == {*FILES, "summary.json"}
    assert finished.is_finished_as_configured()
    with finished:
        finished.write_status("running")
    assert recorded_results(finished.layout) == {}


@pytest.mark.parametrize("folder", ["adapter", "quantized", "export"])
def test_a_run_whose_result_was_deleted_is_not_done(finished: RunDirectory, folder: str):
    shutil.rmtree(finished.path / folder)
    assert missing_results(finished.layout)
    assert not finished.is_finished_as_configured()


@pytest.mark.parametrize("name", [*FILES, "summary.json"])
def test_a_result_of_another_run_is_refused(finished: RunDirectory, name: str):
    (finished.path / name).write_text(json.dumps({"schema": 1, "of": "another run"}))
    with pytest.raises(UserError, match=rf"{name}: is not what the run has written.*delete it"):
        finished.is_finished_as_configured()


def test_the_card_of_an_adapter_may_be_edited(finished: RunDirectory):
    (finished.path / "adapter" / "README.md").write_text("a better card")
    assert finished.is_finished_as_configured()


def test_a_run_of_the_first_release_must_have_its_adapter(finished: RunDirectory):
    status = json.loads(finished.layout.status_json.read_text())
    del status["results"]
    finished.layout.status_json.write_text(json.dumps(status))
    shutil.rmtree(finished.path / "quantized")  # perhaps quant.save=false
    assert finished.is_finished_as_configured()
    shutil.rmtree(finished.path / "adapter")
    assert not finished.is_finished_as_configured()


@pytest.mark.parametrize("results", [[], "x", {"../../etc/passwd": "sha256:0"}, {"a": 1}])
def test_nothing_but_results_is_compared(finished: RunDirectory, results):
    status = json.loads(finished.layout.status_json.read_text()) | {"results": results}
    finished.layout.status_json.write_text(json.dumps(status))
    assert recorded_results(finished.layout) == {}


def test_deleted_or_cut_weights_are_missing(finished: RunDirectory):
    folder = finished.layout.quantized
    (folder / "model.safetensors").write_bytes(b"12345")
    manifest = {"files": {"model.safetensors": {"bytes": 5, "sha256": "00"}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with finished:
        finished.write_status("done", exit_code=0)
    assert finished.is_finished_as_configured()
    (folder / "model.safetensors").write_bytes(b"1234")
    assert missing_results(finished.layout) == ["quantized/model.safetensors"]
    (folder / "model.safetensors").unlink()
    assert not finished.is_finished_as_configured()
