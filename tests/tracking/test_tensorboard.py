"""TensorBoard's own reader finds what the tracker wrote, and no step twice after resuming."""

import importlib.util
import logging
import time
from pathlib import Path

import pytest

from hqqtrain.tracking.composite import CompositeTracker
from hqqtrain.tracking.tensorboard import TensorBoardTracker

pytest.importorskip("tensorboard", reason="tensorboard is optional and not installed")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

CONFIG = {
    "recipe": "tiny_2bit",
    "quant": {"nbits": 2, "skip": ["lm_head"], "cache_dir": None},
    "train": {"packing": True},
    "track": {"api_key": "planted-secret", "project": "p"},
}
LAYERS = {f"quant/relative_error/layers.{i}.up_proj": 0.1 + i / 10 for i in range(3)}
SUMMARY = {
    "schema": 1, "run": {"name": "r", "world_size": 1},
    "quantize": {"bits_per_weight": 2.5, "solver": "hqq"}, "eval": {"final": {"perplexity": 9.5}},
}  # fmt: skip


def start(run_dir: Path, step: int = 0) -> TensorBoardTracker:
    tracker = TensorBoardTracker(run_dir)
    tracker.start(CONFIG, step)
    return tracker


def train(tracker: TensorBoardTracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log({"train/loss": 1.0 / step, "train/global_step": step}, step)


def read(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"))
    return found.Reload()


def texts(found: EventAccumulator, tag: str) -> list[str]:
    return [e.tensor_proto.string_val[0].decode() for e in found.Tensors(f"{tag}/text_summary")]


@pytest.fixture
def complete_run(tmp_path: Path) -> EventAccumulator:
    from hqqtrain.report.plots import plot_perplexities

    figure = plot_perplexities({"quantized": 2.0})
    assert figure is not None
    figure.savefig(tmp_path / "loss.png")
    tracker = start(tmp_path)
    tracker.log(LAYERS, 0)
    train(tracker, 1, 3)
    tracker.log_images({"loss": tmp_path / "loss.png"})
    tracker.log_summary(SUMMARY)
    assert tracker.hint() == f"TensorBoard: tensorboard --logdir {tmp_path / 'tensorboard'}"
    tracker.finish(0)
    return read(tmp_path)


def test_metrics_are_scalars_and_layer_errors_are_not(complete_run: EventAccumulator):
    losses = [(e.step, e.value) for e in complete_run.Scalars("train/loss")]
    assert losses == [(n, pytest.approx(1.0 / n)) for n in (1, 2, 3)]
    assert set(complete_run.Tags()["scalars"]) == {
        "train/loss", "summary/quantize.bits_per_weight", "summary/eval.final.perplexity",
    }  # fmt: skip
    (histogram,) = complete_run.Histograms("quant/relative_error")
    assert histogram.histogram_value.num == 3
    assert histogram.histogram_value.max == pytest.approx(0.3)
    assert "| layers.1.up_proj | 0.2 |" in texts(complete_run, "quant/relative_errors")[0]


def test_configuration_summary_and_plots_are_logged(complete_run: EventAccumulator):
    (config,) = texts(complete_run, "config")
    assert "    quant:\n      nbits: 2\n" in config
    assert "planted-secret" not in config
    assert "| eval.final.perplexity | 9.5 |" in texts(complete_run, "summary")[0]
    (image,) = complete_run.Images("report/loss")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert (image.step, image.width > 100) == (3, True)


def test_hyperparameters_are_the_settings_that_affect_the_result(complete_run: EventAccumulator):
    data = complete_run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    chosen = HParamsPluginData.FromString(data).session_start_info.hparams
    assert chosen["quant.nbits"].number_value == 2
    assert chosen["train.packing"].string_value == "True"
    assert chosen["quant.skip"].string_value == "['lm_head']"
    assert not [name for name in chosen if name.startswith("track")]
    data = complete_run.SummaryMetadata("_hparams_/experiment").plugin_data.content
    metrics = HParamsPluginData.FromString(data).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {
        "summary/quantize.bits_per_weight", "summary/eval.final.perplexity",
    }  # fmt: skip


def test_a_resumed_run_draws_no_step_twice(tmp_path):
    for step, first, last in ((0, 1, 3), (0, 1, 7), (4, 5, 6), (6, 7, 8)):
        tracker = start(tmp_path, step)
        train(tracker, first, last)
        tracker.finish(1)
        time.sleep(1.0)  # the names of the files have a resolution of one second
    assert [event.step for event in read(tmp_path).Scalars("train/loss")] == [*range(1, 9)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_disables_the_tracker_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    tracker = start(tmp_path)
    trackers = CompositeTracker([tracker])
    events = tracker._writer.file_writer.event_writer
    monkeypatch.setattr(events._async_writer._writer, "write", full)
    began = time.monotonic()
    for step in range(1, 200):
        trackers.log({"train/loss": 1.0}, step)
    assert time.monotonic() - began < 10
    assert trackers.active == []
    assert "TensorBoardTracker failed and is disabled" in caplog.text
    assert "no space left" in caplog.text


def test_a_missing_package_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker = start(tmp_path)
    train(tracker, 1, 2)
    tracker.log_summary(SUMMARY)
    tracker.log_images({})
    assert tracker.hint() is None
    tracker.finish(0)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "tensorboard is not installed" in caplog.text
    assert not (tmp_path / "tensorboard").exists()
