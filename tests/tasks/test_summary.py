"""The summary of a run: part by part, restored from a checkpoint, and as rows of a table."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from hqqtrain.common.files import atomic_write_json, without_nonfinite
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.loading.plan import plan_model
from hqqtrain.rundir.schema import SCHEMA, EvalMetrics, ModelMetrics
from hqqtrain.tasks.model import load_or_quantize, plan_settings
from hqqtrain.tasks.summary import RunSummary
from hqqtrain.training.state import TrainState


@pytest.fixture
def summary(make_config, start_run) -> RunSummary:
    with start_run(make_config("quantize")) as run:
        return RunSummary(run.config, run.runtime)


def _in_checkpoint(state: dict) -> dict:
    """Return `state` as a checkpoint's state.json has it."""
    return json.loads(json.dumps(without_nonfinite(state)))


def _resumed(summary: RunSummary, config: RunConfig, runtime: Runtime) -> RunSummary:
    resumed = RunSummary(config, runtime)
    resumed.load_state_dict(_in_checkpoint(summary.state_dict()))
    return resumed


def test_parts_that_did_not_run_are_absent(summary: RunSummary):
    content = summary.content.to_json()
    assert set(content) == {"schema", "run"}
    assert (content["schema"], content["run"]["task"]) == (SCHEMA, "quantize")
    assert (content["run"]["strategy"], content["run"]["world_size"]) == ("single", 1)
    assert summary.table_rows() == []


def test_quantization_counts_the_bits_of_every_layer(make_config, start_run):
    with start_run(make_config("quantize")) as run:
        plan = plan_model(plan_settings(run.config), run.runtime)
        loaded = load_or_quantize(run, plan)
        quantization = run.recorder.summary.content.quantize
        rows = {row.model: row for row in run.recorder.summary.table_rows()}
    # q, k, v and o; gate, up and down.
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    weights = sum(rows * columns for rows, columns in shapes)
    assert (quantization.weights, quantization.nbits, quantization.group_size) == (weights, 4, 16)
    packed = sum(p.numel() * p.element_size() for name, p in loaded.model.named_parameters()
                 if name.endswith(("W_q", "scale", "zero")))  # fmt: skip
    assert quantization.bits_per_weight == pytest.approx(8 * packed / weights)
    assert quantization.bytes_read == quantization.source_bytes > 2 * weights
    assert 0 < quantization.relative_error < 0.05
    assert rows["full precision"].bits_per_weight == 16
    assert rows["quantized"].bits_per_weight == quantization.bits_per_weight
    dense = sum(p.numel() for name, p in loaded.model.named_parameters()
                if not name.endswith(("W_q", "scale", "zero")))  # fmt: skip
    assert rows["quantized"].gib == (packed + 4 * dense) / 2**30  # fp32 in memory
    assert rows["full precision"].gib == quantization.source_bytes / 2**30


def test_the_full_precision_model_keeps_what_was_measured_of_it(summary: RunSummary):
    """With quant.nbits=null it is the base, and the tasks of eval.harness are measured first."""
    harness = {"task": {"acc": 0.5}}
    measured = EvalMetrics(full_precision=ModelMetrics(7.0, harness=harness))
    summary.content = replace(summary.content, eval=measured)
    summary.add_evaluation("text", "final", EvalResult(6.0, 50, 0.5, 7.5))
    assert summary.content.eval is not None
    assert summary.content.eval.full_precision == ModelMetrics(7.5, harness=harness)


def test_an_evaluation_adds_the_reference(summary: RunSummary):
    summary.add_reference_bytes(1000)
    summary.add_evaluation("text", "quantized", EvalResult(9.0, 50, 0.5, 7.0, 0.9))
    summary.add_evaluation("text", "final", EvalResult(8.0, 50))
    evaluation = summary.content.to_json()["eval"]
    assert evaluation == {
        "dataset": "text", "protocol": "windows", "context": 32, "stride": 32, "tokens": 50,
        "bytes_read": 1000, "full_precision": {"perplexity": 7.0},
        "quantized": {"perplexity": 9.0, "kl": 0.5, "top1_agreement": 0.9},
        "final": {"perplexity": 8.0},
    }  # fmt: skip
    rows = [(row.model, row.perplexity, row.kl) for row in summary.table_rows()]
    expected = [("full precision", 7.0, 0.0), ("quantized", 9.0, 0.5), ("trained", 8.0, None)]
    assert rows == expected


def test_the_training_continues_from_the_size_of_the_base(summary: RunSummary):
    summary.add_training(TrainState(steps=4, tokens=100, seconds=2.0, loss=1.5), 2**28)
    training = summary.content.train
    assert (training.steps, training.tokens_per_second, training.loss) == (4, 50.0, 1.5)
    assert training.trainable_parameters == 2**28
    (row,) = summary.table_rows()
    assert (row.model, row.gib, row.seconds) == ("trained", 1.0, 2.0)  # 4 bytes per parameter


def test_a_training_that_took_no_step_has_no_rate(summary: RunSummary):
    summary.add_training(TrainState(), 0)
    assert summary.content.to_json()["train"]["loss"] is None
    assert summary.content.train.tokens_per_second == 0


def test_a_restored_summary_equals_the_saved_one(make_config, start_run):
    with start_run(make_config()) as run:
        before = RunSummary(run.config, run.runtime)
        before.add_evaluation("text", "quantized", EvalResult(9.0, 50, 0.5, 7.0))
        after = _resumed(before, run.config, run.runtime)
    assert after.content == before.content
    assert after.table_rows() == before.table_rows()


@pytest.mark.parametrize("perplexity", [math.inf, math.nan])
def test_a_perplexity_that_is_not_finite_stays_null(
    make_config, start_run, perplexity: float, tmp_path: Path
):
    """JSON has no infinity, and a null that is left out would look like no measurement."""
    with start_run(make_config()) as run:
        before = RunSummary(run.config, run.runtime)
        before.add_evaluation("text", "quantized", EvalResult(perplexity, 50))
        for summary in (before, _resumed(before, run.config, run.runtime)):
            content = without_nonfinite(summary.content.to_json())
            atomic_write_json(tmp_path / "summary.json", content)  # refuses NaN and infinity
            assert content["eval"]["quantized"] == {"perplexity": None}
            assert "quantized" in summary.content.measured_models()


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_a_kl_that_is_not_finite_stays_null_after_two_resumes(make_config, start_run, kl: float):
    """The trained model has no `kl` here: one that was not measured must stay absent."""
    with start_run(make_config()) as run:
        before = RunSummary(run.config, run.runtime)
        before.add_evaluation("text", "quantized", EvalResult(9.0, 50, kl, 7.0))
        before.add_evaluation("text", "final", EvalResult(8.0, 50))
        once = _resumed(before, run.config, run.runtime)
        twice = _resumed(once, run.config, run.runtime)
    for summary in (before, once, twice):
        evaluation = without_nonfinite(summary.content.to_json())["eval"]
        assert evaluation["quantized"] == {"perplexity": 9.0, "kl": None}
        assert evaluation["final"] == {"perplexity": 8.0}
        assert evaluation["full_precision"] == {"perplexity": 7.0}
