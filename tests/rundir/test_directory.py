"""A run directory belongs to one configuration and is locked by one process at a time."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import stat_digest
from hqqtrain.config.groups import TrainConfig
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.renamed import with_old_names
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.identity import MADE_FROM, SOURCE_KEY, input_digests


def _config(tmp_path, name="a", **more) -> RunConfig:
    return RunConfig(run=RunDirConfig(root=str(tmp_path / "runs"), name=name), **more)


def _finish(config) -> RunDirectory:
    with RunDirectory(config) as run:
        run.begin(["hqqtrain", "recipe=x"])
        run.write_summary({"schema": 1})
        run.write_status("done", exit_code=0)
    return run


def test_begin_writes_config_and_status(tmp_path):
    config = _config(tmp_path)
    with RunDirectory(config) as run:
        run.begin(["hqqtrain", "recipe=x", "hub.token=secret"])
        assert run.read_status().status == "running"
        assert run.read_status().exit_code is None
    content = yaml.safe_load((run.path / "config.yaml").read_text())
    assert {k: content[k] for k in asdict(config)} == asdict(config)
    assert content["identity"] == config.identity()
    assert content["command"] == ["hqqtrain", "recipe=x", "hub.token=***"]
    assert content["versions"].keys() >= {"python", "torch", "transformers", "peft"}
    assert "git_revision" in content


def test_done_requires_status_and_summary(tmp_path):
    config = _config(tmp_path)
    assert not RunDirectory(config).is_finished_as_configured()
    run = _finish(config)
    assert run.is_finished_as_configured()
    (run.path / "summary.json").unlink()
    assert not run.is_finished_as_configured()


@pytest.mark.parametrize("status", ["running", "failed", "preempted"])
def test_other_states_are_not_done(tmp_path, status):
    run = _finish(_config(tmp_path))
    with run:
        run.write_status(status, exit_code=1, cause="it broke")
    assert not run.is_finished_as_configured()
    assert run.read_status().cause == "it broke"


def test_the_same_configuration_may_begin_again(tmp_path):
    _finish(_config(tmp_path))
    with RunDirectory(_config(tmp_path)) as run:
        run.begin([])
        assert run.read_status().status == "running"


def test_another_configuration_is_refused_and_nothing_is_written(tmp_path):
    run = _finish(_config(tmp_path))
    before = {p.name: p.stat().st_mtime_ns for p in run.path.iterdir()}
    other = _config(tmp_path, quant=QuantConfig(nbits=3, group_size=None))
    with pytest.raises(UserError) as error, RunDirectory(other):
        pass
    text = str(error.value)
    assert "quant.nbits=3 (saved: 4)" in text
    assert "quant.group_size=null (saved: 64)" in text
    assert "quant.axis" not in text
    assert {p.name: p.stat().st_mtime_ns for p in run.path.iterdir()} == before


def test_keys_that_do_not_define_the_result_may_differ(tmp_path):
    _finish(_config(tmp_path))
    other = _config(tmp_path, recipe="another")
    other.track.backends = []
    RunDirectory(other).check()


@pytest.mark.parametrize("name", ["config.yaml", "status.json"])
@pytest.mark.parametrize("bad", [b"", b"{", b"- 1", b"\xff\xfe\xfa", b"a: \0"])
def test_a_damaged_file_is_named(name, bad, tmp_path):
    run = _finish(_config(tmp_path))
    (run.path / name).write_bytes(bad)
    with pytest.raises(UserError, match=rf"{name}: cannot be read .*another run\.name"), run:
        pass
    assert (run.path / name).read_bytes() == bad


def test_a_truncated_config_is_reported_as_damaged(tmp_path):
    run = _finish(_config(tmp_path))
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text[: text.index("\noptim:") + 1])
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read .*incomplete") as error:
        run.check()
    assert "absent" not in str(error.value)


def test_an_identity_that_differs_is_another_configuration(tmp_path):
    run = _finish(_config(tmp_path))
    (run.path / "config.yaml").write_text("identity: 5")
    with pytest.raises(UserError, match="another configuration"):
        run.check()


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_kill_while_a_finished_run_is_extended_leaves_no_done_status(
    writes, tmp_path, monkeypatch
):
    """Extend a finished run, and kill the process after it has written `writes` files."""
    _finish(_config(tmp_path))
    longer = _config(tmp_path, train=TrainConfig(max_steps=99))
    if (child := os.fork()) == 0:
        left, replace = iter(range(writes)), Path.replace

        def dying(self: Path, target: Path) -> Path:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", dying)
        with RunDirectory(longer) as run:
            run.begin([])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not RunDirectory(longer).is_finished_as_configured()
    with RunDirectory(longer) as run:
        run.begin([])


def test_a_kill_while_a_new_run_begins_does_not_block_the_next(tmp_path, monkeypatch):
    if (child := os.fork()) == 0:
        monkeypatch.setattr(
            RunDirectory, "write_status", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        )
        with RunDirectory(_config(tmp_path)) as run:
            run.begin([])
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with RunDirectory(_config(tmp_path)) as run:
        run.begin([])
        assert run.read_status().status == "running"


def test_a_directory_with_other_files_is_refused(tmp_path):
    run = RunDirectory(_config(tmp_path))
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="contains files, but no run"), run:
        pass
    assert os.listdir(run.path) == ["thesis.tex"]


def test_a_file_at_the_path_is_refused(tmp_path):
    run = RunDirectory(_config(tmp_path))
    run.path.parent.mkdir()
    run.path.write_text("x")
    with pytest.raises(UserError, match="is a file"), run:
        pass


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_directory_that_cannot_be_created_is_found_without_creating_it(tmp_path, below):
    config = _config(tmp_path)
    root = tmp_path / "a file"
    root.write_text("x")
    config.run.root = str(root / below)
    message = rf"^run\.root={root}.*: cannot be written to .*Not a directory: '{root}'"
    with pytest.raises(UserError, match=message):
        RunDirectory(config).check()


def test_a_root_without_permission_is_found_by_the_check(tmp_path, monkeypatch):
    run = RunDirectory(_config(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=r"^run\.root=.*cannot be written to .*Permission denied"):
        run.check()
    run.path.mkdir(parents=True)
    run.check()  # a finished run in a read-only folder is only read


def test_a_directory_without_a_run_is_removed(tmp_path):
    with pytest.raises(RuntimeError), RunDirectory(_config(tmp_path)):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_folders_that_existed_before_are_kept(tmp_path):
    (tmp_path / "runs").mkdir()
    with RunDirectory(_config(tmp_path)):
        pass
    assert os.listdir(tmp_path) == ["runs"]
    assert os.listdir(tmp_path / "runs") == []


def test_a_directory_in_use_is_locked_until_its_process_dies(tmp_path):
    config = _config(tmp_path)
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        with RunDirectory(config) as run:
            run.begin([])
            os.write(write_end, b"x")
            signal.pause()
    os.read(read_end, 1)
    run = RunDirectory(config)
    before = (run.path / "status.json").read_text()
    with pytest.raises(UserError, match="in use by another process"), run:
        pass
    assert (run.path / "status.json").read_text() == before
    assert not run.is_finished_as_configured()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with RunDirectory(config) as run:
        run.write_status("failed", exit_code=1)


@pytest.fixture
def held(tmp_path, monkeypatch) -> Iterator[RunDirectory]:
    """A run directory that a process of job 7 holds."""
    monkeypatch.setattr("hqqtrain.rundir.directory.RELEASE_TIMEOUT", 0.3)
    monkeypatch.setattr("hqqtrain.rundir.directory._POLL_SECONDS", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = RunDirectory(_config(tmp_path)).__enter__()
    run.begin([])
    yield run
    if run._lock is not None:
        run.__exit__()


def test_a_requeued_job_waits_for_a_process_of_its_earlier_start(tmp_path, monkeypatch, held):
    """Slurm takes a silent node for dead, but its processes may still run."""
    monkeypatch.setattr("hqqtrain.rundir.directory.RELEASE_TIMEOUT", 60)
    end = threading.Timer(0.2, held.__exit__)
    end.start()
    with RunDirectory(_config(tmp_path)) as run:
        assert end.finished.is_set()
        run.begin([])


def test_a_requeued_job_waits_for_a_limited_time(tmp_path, held, caplog):
    with pytest.raises(UserError, match="in use by another process"):
        RunDirectory(_config(tmp_path)).__enter__()
    assert "an earlier start of job 7" in caplog.text


@pytest.mark.parametrize("job", ["8", None])
def test_another_job_does_not_wait(tmp_path, monkeypatch, held, caplog, job):
    monkeypatch.delenv("SLURM_JOB_ID")
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    with pytest.raises(UserError, match="in use by another process"):
        RunDirectory(_config(tmp_path)).__enter__()
    assert caplog.text == ""


def test_nonfinite_values_become_null_in_the_summary(tmp_path):
    with RunDirectory(_config(tmp_path)) as run:
        run.begin([])
        run.write_summary({"eval": {"perplexity": float("inf"), "kl": [float("nan"), 1.5]}})
    content = json.loads((run.path / "summary.json").read_text())
    assert content == {"eval": {"perplexity": None, "kl": [None, 1.5]}}


def test_quantized_weights_are_recognized_by_their_source(tmp_path):
    """config.yaml does not suffice: a new run rewrites it, but may be killed before quantizing."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("old")
    config = _config(tmp_path, model=ModelConfig(name_or_path=str(model)))
    run = _finish(config)
    digest = input_digests(config)[SOURCE_KEY]
    assert not run.matches_source("quantized", digest)
    (run.path / "quantized").mkdir()
    (run.path / "quantized" / MADE_FROM).write_text(json.dumps({SOURCE_KEY: digest}))
    assert run.matches_source("quantized", digest)
    (model / "model.safetensors").write_text("another")
    with run:
        run.begin(["hqqtrain"])
        assert not run.matches_source("quantized", input_digests(config)[SOURCE_KEY])


def test_quantized_weights_of_an_earlier_release_are_recognized(tmp_path):
    """It recorded sizes and times of a local model, and nothing for a model of the hub."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("old")
    for name, recorded in ((str(model), stat_digest(model)), ("owner/name", None)):
        run = _finish(_config(tmp_path, name[-4:], model=ModelConfig(name_or_path=name)))
        (run.path / "quantized").mkdir()
        (run.path / "quantized" / MADE_FROM).write_text(json.dumps({SOURCE_KEY: recorded}))
        assert run.matches_source("quantized", "sha256:00")
        (run.path / "quantized" / MADE_FROM).write_text(json.dumps({SOURCE_KEY: "0" * 64}))
        assert not run.matches_source("quantized", "sha256:00")


def test_a_directory_of_an_earlier_release_is_read_with_todays_names(tmp_path):
    """Its config.yaml spells keys as they were called then, and is the same run."""
    config = _config(tmp_path, train=TrainConfig(max_steps=5))
    with RunDirectory(config) as run:
        run.begin([])
    file = run.path / "config.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(with_old_names(values), sort_keys=False))
    assert "checkpointing" in yaml.safe_load(file.read_text())["train"]
    RunDirectory(config).check()
    config.train.max_steps = 6  # may change, so the keys of both are compared
    RunDirectory(config).check()
