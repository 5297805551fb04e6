"""task=export measures what it wrote, and refuses what is too far from the model."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.perplexity import evaluate_perplexity
from hqqtrain.formats.targets.dense import DenseFormat
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.export import export
from hqqtrain.tasks.finetune import finetune


@pytest.fixture
def trained(make_config, start_run) -> Path:
    """Return the folder of a run with an adapter."""
    with start_run(make_config(eval={"source": None})) as run:
        finetune(run)
    return run.layout.folder


@pytest.fixture
def run_export(make_config, start_run, trained: Path, tmp_path: Path):
    """Return a function that exports the trained run with keys of the group `export`."""

    def run_export(evaluation: dict | None = None, **keys):
        name = f"export-{len(list(tmp_path.glob('runs/*')))}"
        config = make_config("export", model={"name_or_path": str(trained)}, export=keys,
                             eval=evaluation or {}, run={"name": name})  # fmt: skip
        with start_run(config) as run:
            export(run)
        return run

    return run_export


def test_an_exact_export_measures_no_kl(run_export, capsys):
    for format in ("packed", "hqq", "humming"):
        run = run_export(format=format)
        metrics = run.recorder.summary.content.export
        assert (metrics.format, metrics.exact, metrics.max_error) == (format, 7, 0)
        assert (metrics.kl, metrics.adapter_form, metrics.adapter) == (None, "separate", False)
        assert (run.layout.export / "adapter" / "adapter_config.json").is_file()
        assert f"export ({format}, adapter separate)" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["merge", "none"])
def test_the_kl_is_that_of_the_model_that_others_load(
    run_export, make_config, monkeypatch, adapter
):
    """A random model of this size differs too little in bf16, so a layer is written too large."""
    exact = run_export(dtype="fp32", adapter=adapter)
    tensors = DenseFormat.tensors

    def enlarged(self, export, dtype):
        for name, tensor in tensors(self, export, dtype):
            yield name, tensor * 30 if "down_proj" in name else tensor

    monkeypatch.setattr(DenseFormat, "tensors", enlarged)
    rounded = run_export(dtype="bf16", adapter=adapter, max_kl=10.0)
    metrics = rounded.recorder.summary.content.export
    assert exact.recorder.summary.content.export.kl is None
    assert (metrics.dtype, metrics.bits_per_weight) == ("bfloat16", 16)
    models = [
        AutoModelForCausalLM.from_pretrained(run.layout.export, dtype=torch.float32)
        for run in (rounded, exact)
    ]
    config = make_config("export")
    tokenizer = load_tokenizer(exact.layout.export)
    held_out = load_eval_set(config.eval, config.data, tokenizer, 32)
    alone = Communicator(0, 1, torch.device("cpu"))
    measured = evaluate_perplexity(models[0], held_out, alone, batch_size=2, reference=models[1])
    assert metrics.kl == pytest.approx(measured.kl, rel=1e-3)
    assert metrics.kl > 1e-4
    assert metrics.approximate == 1


def test_what_is_too_far_is_refused_and_removed(run_export, tmp_path):
    with pytest.raises(UserError, match=r"export\.max_kl=1e-12: the export has a KL divergence of"):
        run_export(dtype="bf16", max_kl=1e-12)
    with pytest.raises(UserError, match=r"export\.max_error=1e-06: a weight of model\.layers\.0"):
        run_export(dtype="bf16", max_error=1e-6)
    assert not list(tmp_path.glob("runs/export-*/export"))
    run_export(dtype="bf16", max_kl=None)


def test_without_a_text_the_kl_is_not_measured(run_export, caplog):
    with caplog.at_level(logging.WARNING):
        run = run_export({"source": None}, dtype="bf16")
    assert run.recorder.summary.content.export.kl is None
    assert "the KL divergence is not measured: eval.source=null" in caplog.text


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(run_export, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("hqqtrain.tasks.export.load_or_quantize", fail)
    with pytest.raises(UserError, match=r"groups of 16, and MLX has multiples of 32\. Use dense"):
        run_export(format="mlx")
    with pytest.raises(UserError, match=r"export\.adapter=merge: export\.format=hqq allows"):
        run_export(format="hqq", adapter="merge")
