"""Where a task gets its packed weights from, in order: its own run, the source, the cache."""

import json
import os
from pathlib import Path

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.loading.model_builder import LoadedModel
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks.model import check_fits_run, load_or_quantize, plan_settings


@pytest.fixture
def load(start_run):
    """Return a function that loads the model of a configuration, in a run of its own."""

    def load(config: RunConfig) -> LoadedModel:
        with start_run(config) as run:
            return load_or_quantize(run, plan_model(plan_settings(config), run.runtime))

    return load


def _same_weights(ours: LoadedModel, theirs: LoadedModel) -> bool:
    pairs = zip(ours.model.state_dict().items(), theirs.model.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_the_settings_of_each_task(make_config):
    found = {task: plan_settings(make_config(task)) for task in
             ("finetune", "quantize", "eval", "export")}  # fmt: skip
    assert [task for task, settings in found.items() if settings.adapts] == ["finetune"]
    assert [task for task, settings in found.items() if settings.executes] == ["finetune", "eval"]


def test_a_run_never_quantizes_twice(make_config, load, tmp_path: Path):
    first = load(make_config("quantize"))
    folder = tmp_path / "runs" / "run"
    (folder / "status.json").write_text(json.dumps({"status": "failed"}))
    again = load(make_config("quantize"))
    assert again.bytes_read < first.bytes_read == first.plan.reader.total_bytes
    assert again.relative_error == first.relative_error
    assert again.settings == first.settings
    assert _same_weights(again, first)


def test_a_finetune_without_save_leaves_no_packed_weights(make_config, load, tmp_path: Path):
    load(make_config(quant={"save": False}))
    assert not (tmp_path / "runs" / "run" / "quantized").exists()


def test_the_cache_is_filled_once_and_read_by_other_runs(make_config, load, tmp_path: Path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    first = load(make_config("quantize", quant=cache, run={"name": "first"}))
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    made = entry.stat().st_mtime_ns
    second = load(make_config("quantize", quant=cache, run={"name": "second"}))
    assert entry.stat().st_mtime_ns == made
    assert second.bytes_read < first.bytes_read
    assert _same_weights(second, first)
    # Each run has its own copy, so that it can resume without the cache.
    for name in ("first", "second"):
        assert (tmp_path / "runs" / name / "quantized" / "config.json").is_file()


def test_packed_weights_that_were_altered_are_refused(make_config, load, tmp_path: Path):
    load(make_config("quantize"))
    packed = tmp_path / "runs" / "run" / "quantized"
    (file,) = packed.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    source = {"name_or_path": str(packed)}
    with pytest.raises(UserError, match="Copy it again, or quantize again"):
        load(make_config("eval", model=source, run={"name": "other"}))


def test_a_model_that_does_not_fit_is_refused(make_config, start_run, monkeypatch):
    monkeypatch.setattr("hqqtrain.loading.memory_check.free_host_memory", lambda: 1000)
    with start_run(make_config()) as run:
        plan = plan_model(plan_settings(run.config), run.runtime)
        with pytest.raises(UserError, match="weights and optimizer need"):
            check_fits_run(run, plan)


def test_a_run_whose_model_has_changed_quantizes_again_and_says_so(
    make_config, load, tmp_path: Path, tiny_model: Path, caplog
):
    first = load(make_config("quantize"))
    weights = tiny_model / "model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "runs" / "run" / "status.json").write_text(json.dumps({"status": "failed"}))
    caplog.set_level("WARNING")
    again = load(make_config("quantize"))
    assert "was made from other files of model.name_or_path" in caplog.text
    assert again.bytes_read == first.bytes_read, "the dense weights are read again"
