"""A failing tracker never fails the training, metrics.jsonl survives kills, secrets are masked."""

import json
import logging
from pathlib import Path

import pytest
from disk import limit_file_size

import hqqtrain
from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.infra import TrackConfig
from hqqtrain.tracking.composite import CompositeTracker, open_trackers
from hqqtrain.tracking.jsonl import JsonlTracker, read_metrics

ROOT = Path(hqqtrain.__file__).parents[1]


class Failing:
    """A tracker that raises in one method, and records every call."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, []

    def __getattr__(self, name):
        def method(*_):
            self.calls.append(name)
            if name == self.where:
                raise OSError("no space left on device")

        return method


def run_all(trackers: CompositeTracker) -> None:
    trackers.start({})
    trackers.log({"train/loss": 1.0}, 1)
    trackers.log({"train/loss": 1.0}, 2)
    trackers.log_summary({})
    trackers.log_images({})
    trackers.log_artifact(Path("adapter"))
    trackers.hints()
    trackers.finish(0)


def test_no_row_is_lost_once_a_full_disk_has_space_again(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    trackers = CompositeTracker([JsonlTracker(path)])
    trackers.start({})
    trackers.log({"train/loss": 1.0}, 1)
    with limit_file_size(path.stat().st_size + 20):  # space for half a row
        for step in (2, 3):
            trackers.log({"train/loss": 1.0 / step}, step)
    assert len(read_metrics(path)) == 1
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    trackers.log({"train/loss": 0.25}, 4)
    assert [row["train/loss"] for row in read_metrics(path)] == [1.0, 0.5, 1 / 3, 0.25]
    trackers.finish(0)


@pytest.mark.parametrize(
    "where", ["start", "log", "log_summary", "log_images", "log_artifact", "hint", "finish"]
)
def test_a_failing_tracker_warns_once_and_is_disabled(tmp_path, caplog, where):
    failing = Failing(where)
    run_all(CompositeTracker([failing, JsonlTracker(tmp_path / "metrics.jsonl")]))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "no space left" in caplog.text
    assert failing.calls[-1] == where
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_keyboard_interrupt_is_not_swallowed():
    class Interrupted:
        def log(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompositeTracker([Interrupted()]).log({"train/loss": 1.0}, 1)


def test_only_the_main_process_tracks(tmp_path):
    trackers = open_trackers(TrackConfig(), tmp_path / "run", {}, is_main=False)
    run_all(trackers)
    assert not (tmp_path / "run").exists()


def test_metrics_jsonl_is_written_with_any_backends(tmp_path):
    trackers = open_trackers(TrackConfig(backends=[]), tmp_path / "run", {})
    run_all(trackers)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["train/global_step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 1.0)]


def test_metrics_of_a_step_are_not_logged_twice(tmp_path):
    config = TrackConfig(backends=[])
    first = open_trackers(config, tmp_path, {})
    first.log({"quant/relative_error/a": 0.5}, 0)
    first.log({"eval/loss": 3.0}, 0)
    for step in (1, 2, 3):
        first.log({"train/loss": 1.0 / step}, step)
    first.log({"eval/loss": 2.0}, 3)
    second = open_trackers(config, tmp_path, {}, step=2)
    second.log({"quant/relative_error/a": 0.5}, 0)
    second.log({"eval/loss": 3.0}, 0)
    second.log({"eval/loss": 2.5, "eval/kl": 0.5}, 2)
    second.log({"train/loss": 1.0 / 3}, 3)
    third = open_trackers(config, tmp_path, {}, step=2)
    third.log({"eval/loss": 2.5, "eval/kl": 0.5}, 2)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["train/global_step"], *sorted(line.keys() - {"train/global_step", "time"}))
              for line in lines]  # fmt: skip
    assert logged == [
        (0, "quant/relative_error/a"), (0, "eval/loss"), (1, "train/loss"), (2, "train/loss"),
        (2, "eval/kl", "eval/loss"),
    ]  # fmt: skip
    assert read_metrics(tmp_path / "metrics.jsonl")[2].items() >= {
        ("train/loss", 0.5), ("eval/loss", 2.5), ("eval/kl", 0.5)
    }  # fmt: skip


def test_secrets_are_masked_by_key_and_by_pattern():
    config = {
        "hub_token": "abc", "api_key": "abc", "WANDB_API_KEY": "abc", "db": {"password": "abc"},
        "name": "hf_ABCDEFGHIJKLMNOPQRSTUVWXYZABCD", "list": ["https://user:pass@host/x", "fine"],
        "tokens": 65536, "eval": {"tokens": 5}, "path": "runs/hf_models/x", "none": None,
    }  # fmt: skip
    result = mask_secrets(config)
    assert "abc" not in json.dumps(result)
    assert "pass@" not in json.dumps(result)
    assert result["name"] == "***"
    assert result["list"][1] == "fine"
    assert (result["tokens"], result["eval"], result["none"]) == (65536, {"tokens": 5}, None)
    assert config["hub_token"] == "abc"
