"""The full-precision model of a run gives the same figures in every way of `eval.reference`."""

import logging
from dataclasses import replace

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.strategies.registry import STRATEGIES
from hqqtrain.loading.model_builder import RunnableModel, wrap_for_execution
from hqqtrain.loading.plan import plan_model
from hqqtrain.rundir.schema import EvalMetrics
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import load_held_out_data
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.model import load_or_quantize, plan_settings


def _runnable(run: Run) -> RunnableModel:
    plan = plan_model(plan_settings(run.config), run.runtime)
    return wrap_for_execution(load_or_quantize(run, plan), run.runtime.strategy)


def _evaluate(run: Run) -> EvalMetrics:
    runnable = _runnable(run)
    held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
    evaluation = RecordedEvaluation(run, runnable, held_out)
    evaluation.evaluate_as("quantized", adapted=False)
    evaluation.evaluate_as("final", adapted=True)
    evaluation.record_samples()
    return run.recorder.summary.content.eval


def test_all_ways_give_the_same_figures(make_config, start_run, tmp_path):
    found = {}
    for name in ("resident", "streamed", "cached", "again"):
        reference = {"again": "cached"}.get(name, name)
        config = make_config(
            "eval", eval={"reference": reference, "cache_dir": str(tmp_path / "cache")},
            quant={"skip": []}, run={"name": name},
        )  # fmt: skip
        with start_run(config) as run:
            found[name] = _evaluate(run)
            has_whole = "full precision" in run.recorder.samples[0].continuations
            assert has_whole == (reference == "resident")
    resident = found["resident"]
    assert resident.quantized.kl > 0
    for name in ("streamed", "cached", "again"):
        assert found[name].quantized == resident.quantized, name
        assert found[name].full_precision == resident.full_precision, name
    head = 2 * 4096 * 32
    embeddings, norms = head, 2 * 3 * 32  # the quantized model has them, too
    assert found["streamed"].bytes_read == resident.bytes_read - embeddings - norms
    assert found["cached"].bytes_read == found["streamed"].bytes_read
    assert found["again"].bytes_read == head


def test_packed_weights_have_no_reference(make_config, start_run, tmp_path, caplog):
    with start_run(make_config("quantize")) as run:
        load_or_quantize(run, plan_model(plan_settings(run.config), run.runtime))
    config = make_config("eval", eval={"reference": "streamed"}, run={"name": "again"})
    config.model.name_or_path = str(run.layout.quantized)
    with start_run(config) as run:
        assert _evaluate(run).full_precision is None
    assert "eval.reference=streamed: " in caplog.text
    assert "has packed weights only" in caplog.text


@pytest.mark.parametrize("reference", ["streamed", "cached"])
def test_a_model_that_cannot_run_layer_by_layer_is_refused(
    make_config, start_run, monkeypatch, reference
):
    monkeypatch.setattr("hqqtrain.loading.plan.probe_layerwise", lambda *_: "repeats its layers")
    config = make_config("eval", eval={"reference": reference})
    message = (
        f"eval.reference={reference}: needs the decoder layers one after the other, but "
        "LlamaForCausalLM repeats its layers. Set eval.reference=resident or off."
    )
    with start_run(config) as run:
        with pytest.raises(UserError, match=message):
            plan_model(plan_settings(config), run.runtime)
        config.eval.source = None  # nothing is evaluated
        plan_model(plan_settings(config), run.runtime)


@pytest.mark.parametrize(
    ("skip", "strategy", "reason"),
    [
        (["lm_head"], "single", None),
        ([], "single", "only if the head is neither quantized nor trained"),
        (["lm_head"], "fsdp2", "parallel.strategy=fsdp2 shards it"),
    ],
)
def test_the_log_says_why_the_reference_is_called_again(
    make_config, start_run, caplog, monkeypatch, skip, strategy, reason
):
    with start_run(make_config(quant={"skip": skip})) as run:
        runnable = _runnable(run)
        held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
        runtime = replace(run.runtime, strategy=STRATEGIES[strategy](run.runtime.comm))
        run = replace(run, runtime=runtime)
        monkeypatch.setattr(
            "hqqtrain.tasks.reference.build_reference", lambda *_: (torch.nn.Identity(), 0)
        )
        with caplog.at_level(logging.INFO, logger="hqqtrain"):
            RecordedEvaluation(run, runnable, held_out)
    messages = [text for text in caplog.messages if "called at every evaluation" in text]
    assert len(messages) == (reason is not None)
    assert all(reason in text for text in messages)
