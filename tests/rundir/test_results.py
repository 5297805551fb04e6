"""Results of a finished run that were deleted, edited, or replaced by those of another run."""

import json
import os
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


@pytest.fixture(params=["quantized/model.safetensors", "export/model-00002-of-00002.safetensors"])
def weights(finished: RunDirectory, request) -> Path:
    """Return a file of weights of the finished run."""
    file = finished.path / request.param
    file.write_bytes(b"12345")
    with finished:
        finished.write_status("done", exit_code=0)
    return file


def test_a_run_whose_weights_are_as_written_is_done(finished: RunDirectory, weights: Path):
    assert finished.is_finished_as_configured()
    (weights.parent / "README.md").write_text("a card")
    (weights.parent / ".gitattributes").write_text("")
    assert finished.is_finished_as_configured()


def test_deleted_or_cut_weights_are_missing(finished: RunDirectory, weights: Path):
    weights.write_bytes(b"1234")
    assert missing_results(finished.layout) == [str(weights.relative_to(finished.path))]
    weights.unlink()
    assert not finished.is_finished_as_configured()


@pytest.mark.parametrize("content", [b"12346", b"123456"])
def test_other_weights_are_refused(finished: RunDirectory, weights: Path, content: bytes):
    times = weights.stat()
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=f"{weights}: is not what the run has written.*delete it"):
        finished.is_finished_as_configured()


def test_the_other_files_of_an_export_are_results(finished: RunDirectory):
    tokenizer = finished.layout.export / "tokenizer.json"
    tokenizer.write_text("{}")
    with finished:
        finished.write_status("done", exit_code=0)
    tokenizer.write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not what the run has written"):
        finished.is_finished_as_configured()
    tokenizer.unlink()
    assert missing_results(finished.layout) == ["export/tokenizer.json"]


def test_checkpoints_may_be_deleted(finished: RunDirectory):
    folder = finished.layout.checkpoints / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    with finished:
        finished.write_status("done", exit_code=0)
    shutil.rmtree(finished.layout.checkpoints)
    assert finished.is_finished_as_configured()
