"""Trackers may fail, training may not; metrics.jsonl survives kills; no secret leaves."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hqqtrain
from hqqtrain.config import TrackConfig
from hqqtrain.config.secrets import masked
from hqqtrain.track import JsonlTracker, Trackers, open_trackers, read_metrics
from hqqtrain.track import wandb as wandb_module

ROOT = Path(hqqtrain.__file__).parents[1]


class Failing:
    """A tracker that raises in one method, and counts every call."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, []

    def __getattr__(self, name):
        def method(*_):
            self.calls.append(name)
            if name == self.where:
                raise OSError("no space left on device")

        return method


def run_all(trackers: Trackers) -> None:
    trackers.start({})
    trackers.log({"train/loss": 1.0}, 1)
    trackers.log({"train/loss": 1.0}, 2)
    trackers.summary({})
    trackers.images({})
    trackers.finish(0)


@pytest.mark.parametrize("where", ["start", "log", "summary", "images", "finish"])
def test_a_failing_tracker_warns_once_and_is_left_out(tmp_path, caplog, where):
    failing = Failing(where)
    run_all(Trackers([failing, JsonlTracker(tmp_path / "metrics.jsonl")]))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "no space left" in caplog.text
    assert failing.calls[-1] == where
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_what_stops_a_program_is_not_swallowed():
    class Interrupted:
        def log(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).log({}, 1)


def test_only_the_main_process_tracks(tmp_path):
    trackers = open_trackers(TrackConfig(), tmp_path / "run", {}, main=False)
    run_all(trackers)
    assert not (tmp_path / "run").exists()


def test_metrics_jsonl_is_written_whatever_the_backends(tmp_path):
    trackers = open_trackers(TrackConfig(backends=[]), tmp_path / "run", {})
    run_all(trackers)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["train/global_step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 1.0)]


def test_a_server_that_is_down_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_module, "INIT_SECONDS", 2.0)
    started = time.monotonic()
    run_all(open_trackers(TrackConfig(), tmp_path, {}))
    assert time.monotonic() - started < 20
    assert "WandbTracker failed" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def jsonl(path: Path) -> JsonlTracker:
    tracker = JsonlTracker(path)
    tracker.start({})
    return tracker


def test_every_line_is_strict_json_with_step_and_time(tmp_path):
    tracker = jsonl(tmp_path / "m.jsonl")
    values = {"a": float("nan"), "b": float("inf"), "c": torch.tensor(2.5), "d": np.float32(0.5)}
    tracker.log(values, 7)
    tracker.finish(0)
    (line,) = (tmp_path / "m.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads(line, parse_constant=refuse)
    assert abs(row.pop("time") - time.time()) < 60
    assert row == {"train/global_step": 7, "a": None, "b": None, "c": 2.5, "d": 0.5}


def test_a_resumed_run_appends_after_a_torn_line_and_later_rows_count(tmp_path):
    path = tmp_path / "m.jsonl"
    tracker = jsonl(path)
    for step in (1, 2):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish(0)
    with path.open("a") as file:
        file.write('{"train/global_step": 3, "train/lo')
    assert [row["train/global_step"] for row in read_metrics(path)] == [1, 2]
    tracker = jsonl(path)
    tracker.log({"train/loss": 0.5}, 2)
    tracker.log({"eval/loss": 0.25}, 2)
    tracker.finish(0)
    rows = read_metrics(path)
    assert [row["train/global_step"] for row in rows] == [1, 2]
    assert (rows[1]["train/loss"], rows[1]["eval/loss"]) == (0.5, 0.25)
    assert len(path.read_text().splitlines()) == 4


def test_a_killed_process_has_written_every_row(tmp_path):
    code = (
        "import os; from pathlib import Path; from hqqtrain.track import JsonlTracker\n"
        f"t = JsonlTracker(Path({str(tmp_path)!r}) / 'm.jsonl'); t.start({{}})\n"
        "for i in range(100): t.log({'train/loss': float(i)}, i)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(read_metrics(tmp_path / "m.jsonl")) == 100


def test_secrets_are_masked_by_key_and_by_form():
    config = {
        "hub_token": "abc", "api_key": "abc", "WANDB_API_KEY": "abc", "db": {"password": "abc"},
        "name": "hf_ABCDEFGHIJKLMNOP", "list": ["https://user:pass@host/x", "fine"],
        "tokens": 65536, "eval": {"tokens": 5}, "path": "runs/hf_models/x", "none": None,
    }  # fmt: skip
    result = masked(config)
    assert "abc" not in json.dumps(result)
    assert "pass@" not in json.dumps(result)
    assert result["name"] == "***"
    assert result["list"][1] == "fine"
    assert (result["tokens"], result["eval"], result["none"]) == (65536, {"tokens": 5}, None)
    assert config["hub_token"] == "abc"
