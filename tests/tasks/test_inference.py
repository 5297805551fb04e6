"""The tasks without training: quantize, eval and export."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.formats.packed import read_quantized_settings
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.inference import evaluate, export, quantize
from hqqtrain.tasks.resources import workload_of

TASKS = {"finetune": finetune, "quantize": quantize, "eval": evaluate, "export": export}


@pytest.fixture
def run_task(make_config, start_run, tmp_path: Path):
    """Return a function that runs a task in a new run directory and returns the run."""

    def run_task(task: str, **groups: dict):
        name = f"{task}-{len(list(tmp_path.glob('runs/*')))}"
        config: RunConfig = make_config(task, **groups | {"run": {"name": name}})
        with start_run(config) as run:
            TASKS[task](run)
        return run

    return run_task


@pytest.fixture
def trained(run_task) -> Path:
    return run_task("finetune", eval={"source": None}).layout.folder


def test_quantize_saves_the_packed_model(run_task):
    run = run_task("quantize")
    settings, summary = read_quantized_settings(run.layout.quantized), run.recorder.summary.content
    assert settings.fingerprint == summary.quantize.fingerprint
    assert len(settings.modules) == 7
    assert (summary.eval, summary.train) == (None, None)
    assert not run.layout.adapter.exists()


def test_eval_measures_a_model_and_writes_no_weights(run_task):
    run = run_task("eval")
    assert set(run.recorder.summary.content.measured_models()) == {"full_precision", "quantized"}
    assert not run.layout.quantized.exists()


def test_eval_of_a_run_measures_its_adapter_too(run_task, trained: Path):
    run = run_task("eval", model={"name_or_path": str(trained)})
    models = run.recorder.summary.content.measured_models()
    assert set(models) == {"quantized", "final"}
    assert models["quantized"].perplexity != models["final"].perplexity
    assert run.recorder.summary.content.quantize.relative_error is None  # not measured again


def test_export_merges_the_adapter(run_task, trained: Path):
    run = run_task("export", model={"name_or_path": str(trained)})
    merged = AutoModelForCausalLM.from_pretrained(run.layout.export, dtype=torch.float32)
    base = run_task("export", model={"name_or_path": str(trained / "quantized")})
    plain = AutoModelForCausalLM.from_pretrained(base.layout.export, dtype=torch.float32)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(merged(tokens).logits, plain(tokens).logits)


def test_a_packed_export_has_no_place_for_an_adapter(run_task, trained: Path):
    packed = {"format": "packed"}
    with pytest.raises(UserError, match=r"export\.format=packed: would leave out the adapter"):
        run_task("export", model={"name_or_path": str(trained)}, export=packed)
    run = run_task("export", model={"name_or_path": str(trained / "quantized")}, export=packed)
    ours, theirs = (
        read_quantized_settings(run.layout.export),
        read_quantized_settings(trained / "quantized"),
    )
    assert ours == theirs


def test_only_a_training_uses_trackers(run_task, trained: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("a tracker was started")

    monkeypatch.setattr("hqqtrain.tracking.composite.WandbTracker", fail)
    monkeypatch.setattr("hqqtrain.tracking.composite.TensorBoardTracker", fail)
    track = {"backends": ["wandb", "tensorboard"]}
    for task in ("quantize", "eval", "export"):
        run = run_task(task, model={"name_or_path": str(trained)}, track=track)
        assert run.layout.metrics_jsonl.exists()


def test_an_export_says_what_it_wrote(run_task, trained: Path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("an empty report was written")

    monkeypatch.setattr("hqqtrain.tasks.finalize.write_report", fail)
    run = run_task("export", model={"name_or_path": str(trained)})
    exported = run.recorder.summary.content.export
    files = list(run.layout.export.glob("*.safetensors"))
    assert exported.bytes == sum(file.stat().st_size for file in files) > 0
    assert (exported.format, exported.dtype, exported.adapter) == ("dense", "float32", True)
    output = capsys.readouterr().out
    assert "export (float32, adapter merged)" in output
    assert "perplexity" not in output  # a column without a value
    assert f"AutoModelForCausalLM.from_pretrained('{run.layout.export}')" in output
    packed = run_task(
        "export", model={"name_or_path": str(trained / "quantized")}, export={"format": "packed"}
    )
    assert packed.recorder.summary.content.export.to_json().keys() == {"format", "bytes", "adapter"}
    assert f"model.name_or_path={packed.layout.export}" in capsys.readouterr().out


def test_the_table_of_quantize_has_no_empty_columns(run_task, capsys):
    run_task("quantize")
    header = next(line for line in capsys.readouterr().out.splitlines() if "model" in line)
    assert header.split() == ["model", "bits", "per", "weight", "GiB", "seconds"]


@pytest.mark.parametrize(
    ("task", "is_packed", "has_reference"),
    [("finetune", False, True), ("finetune", True, False), ("eval", False, True),
     ("eval", True, False), ("quantize", False, False), ("export", False, False)],
)  # fmt: skip
def test_the_estimate_has_a_reference_only_where_one_is_loaded(task, is_packed, has_reference):
    workload = workload_of(RunConfig(task=task), is_packed=is_packed)
    assert workload.has_reference == has_reference
