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
