"""The record of a run: when its directory begins, what each event writes, and what resumes."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks import recorder as recorder_module
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.model import load_or_quantize, plan_settings
from hqqtrain.tasks.recorder import RunRecorder
from hqqtrain.training.state import StepResult

METRICS = {"train/loss": 2.5, "train/tokens_per_second": 10.0, "train/global_step": 1}


@pytest.fixture
def begun(make_config, start_run):
    """Return a run whose model is loaded, so that its directory has begun."""
    with start_run(make_config()) as run:
        _begin(run)
        yield run


def _begin(run: Run, checkpoint: object = None) -> None:
    load_or_quantize(run, plan_model(plan_settings(run.config), run.runtime), checkpoint)


def _metrics(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.layout.metrics_jsonl.read_text().splitlines()]


def test_the_directory_begins_when_the_model_is_loaded(begun: Run):
    assert json.loads(begun.layout.status_json.read_text())["status"] == "running"
    (ranks,) = json.loads(begun.layout.loading_json.read_text())["ranks"]
    assert ranks["rank"] == 0
    assert ranks["bytes_read"] > 0
    (row,) = _metrics(begun)
    errors = {k: v for k, v in row.items() if k.startswith("quant/relative_error/")}
    assert len(errors) == 7
    assert all(0 < error < 0.1 for error in errors.values())


def test_the_report_is_written_from_the_first_file_to_the_end(make_config, start_run, monkeypatch):
    calls = []

    class Live:
        def __init__(self, folder, summary):
            calls.append(folder)
            self.summary = summary

        def start(self):
            calls.append(self.summary()["quantize"]["nbits"])

        def stop(self):
            calls.append("stop")

    monkeypatch.setattr(recorder_module, "LiveReport", Live)
    monkeypatch.setattr(recorder_module, "finalize_failure", lambda *_: calls.append("finalize"))

    def fail(config) -> None:
        with start_run(config) as run:
            assert calls == []
            _begin(run)
            raise ZeroDivisionError

    config = make_config()
    with pytest.raises(ZeroDivisionError):
        fail(config)
    assert calls == [Path(config.run.root) / "run", 4, "stop", "finalize"]


def test_every_evaluation_is_a_line_of_the_log(begun: Run, caplog):
    with caplog.at_level("INFO"):
        begun.recorder.log_step(20, METRICS)
        begun.recorder.log_evaluation(EvalResult(10.0, 5, 0.25))
        begun.recorder.log_evaluation(EvalResult(float("inf"), 5))
        begun.recorder.log_evaluation(EvalResult(10.0, 5, 0.25, 9.0, 0.925))
    assert "step 20: held-out loss 2.3026, perplexity 10, KL 0.2500" in caplog.messages
    assert "step 20: held-out loss inf, perplexity inf" in caplog.messages
    assert caplog.messages[-1].endswith("KL 0.2500, top-1 agreement 92.5%")


def test_a_step_is_logged_under_its_number(begun: Run):
    begun.recorder.log_step(3, METRICS)
    begun.recorder.log_evaluation(EvalResult(10.0, 5, 0.25, 9.0, 0.925))
    *_, step, evaluation = _metrics(begun)
    assert step["train/loss"] == 2.5
    assert evaluation["train/global_step"] == 3
    assert (evaluation["eval/perplexity"], evaluation["eval/kl"]) == (10.0, 0.25)
    assert evaluation["eval/top1_agreement"] == 0.925


def test_evaluations_are_part_of_the_summary(begun: Run):
    recorder = begun.recorder
    assert not recorder.has_evaluated("quantized")
    recorder.record_evaluation("quantized", EvalResult(10.0, 5))
    recorder.record_reference_bytes(77)
    assert recorder.has_evaluated("quantized")
    assert recorder.summary.content.eval.bytes_read == 77
    recorder.record_evaluation("final", EvalResult(8.0, 5, 0.25, 7.0, 0.9))
    assert recorder.has_evaluated("final")


def test_a_batch_that_is_not_finite_is_saved(begun: Run, monkeypatch, caplog):
    step = StepResult(3, 4, 500, float("nan"), grad_norm=float("inf"))
    begun.recorder.save_nonfinite_batch(step, {"layer": "q_proj", "samples": [1, 2]})
    file = begun.layout.nonfinite / "batch-00000004.json"
    assert json.loads(file.read_text()) == {
        "batch": 4, "step": 3, "loss": "nan", "grad_norm": "inf", "layer": "q_proj",
        "samples": [1, 2],
    }  # fmt: skip

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recorder_module, "atomic_write_json", fail)
    begun.recorder.save_nonfinite_batch(step, {})
    assert "batch 4 was not saved" in caplog.text


def test_a_resumed_record_continues_the_saved_one(make_config, start_run):
    with start_run(make_config(run={"name": "first"})) as run:
        _begin(run)
        run.recorder.record_evaluation("quantized", EvalResult(10.0, 5))
        state = json.loads(json.dumps(run.recorder.state_dict()))
        errors = run.recorder.layer_errors
    with start_run(make_config(run={"name": "second"})) as run:
        _begin(run, SimpleNamespace(state={"record": state}, step=8))
        assert run.recorder.has_evaluated("quantized")
        assert (run.recorder.step_number, run.recorder.layer_errors) == (8, errors)
        assert not run.layout.metrics_jsonl.exists() or not _metrics(run)  # logged before


def test_the_directory_is_locked_between_enter_and_exit(make_config, start_run):
    config = make_config()
    with start_run(config) as run:
        other = RunRecorder(config, run.runtime, ["hqqtrain"])
        with pytest.raises(AssertionError, match="was not entered"):
            _ = other.history
        with pytest.raises(UserError, match="in use by another process"):
            other.__enter__()
    assert not Path(config.run.root).exists()  # nothing had begun


def test_an_error_while_the_last_files_are_written_is_recorded(make_config, start_run, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recorder_module, "finalize_success", fail)
    with pytest.raises(UserError, match="the disk is full"), start_run(make_config()) as run:
        _begin(run)
    assert json.loads(run.layout.status_json.read_text())["exit_code"] == 2


def test_the_log_of_an_evaluation_names_the_models(make_config, start_run, caplog):
    with start_run(make_config("eval")) as run, caplog.at_level("INFO"):
        _begin(run)
        run.recorder.record_evaluation("quantized", EvalResult(10.0, 5))
        run.recorder.record_evaluation("final", EvalResult(8.0, 5))
    assert "quantized model: held-out loss 2.3026, perplexity 10" in caplog.messages
    assert "trained model: held-out loss 2.0794, perplexity 8" in caplog.messages
