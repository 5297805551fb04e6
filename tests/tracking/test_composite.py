"""A failing tracker never fails the training, metrics.jsonl survives kills, secrets are masked."""

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
from disk import no_room

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
    with no_room(path.stat().st_size + 20):  # space for half a row
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


def jsonl(path: Path, step: int = 0) -> JsonlTracker:
    tracker = JsonlTracker(path)
    tracker.start({}, step)
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


def rows(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["train/global_step"], line["train/loss"]) for line in lines]


def test_a_resumed_run_removes_the_rows_it_logs_again(tmp_path):
    path = tmp_path / "m.jsonl"
    tracker = jsonl(path)
    for step in (0, 1, 2, 3, 4):
        tracker.log({"train/loss": step / 8}, step)
    tracker.finish(0)
    with path.open("a") as file:
        file.write('{"train/global_step": 5, "train/lo')
    assert [row["train/global_step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4]
    tracker = jsonl(path, step=2)
    assert rows(path) == [(0, 0.0), (1, 0.125), (2, 0.25)]
    tracker.log({"train/loss": 9.0}, 3)
    tracker.finish(0)
    assert rows(path) == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 9.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_restarted_run_starts_a_new_file(tmp_path):
    path = tmp_path / "m.jsonl"
    jsonl(path).log({"train/loss": 1.0}, 1)
    jsonl(path).log({"train/loss": 2.0}, 1)
    assert rows(path) == [(1, 2.0)]


def test_lines_that_are_not_rows_do_not_survive_a_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    row = b'{"train/global_step": 1, "train/loss": 1.0}\n'
    path.write_bytes(row + b"\0\0\0\n" + b"[1]\n" + b'{"time": 1}\n' + row[:-1])
    jsonl(path, step=3)
    assert path.read_bytes() == row


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


def test_a_killed_process_has_written_every_row(tmp_path):
    code = (
        "import os; from pathlib import Path; from hqqtrain.tracking.jsonl import JsonlTracker\n"
        f"t = JsonlTracker(Path({str(tmp_path)!r}) / 'm.jsonl'); t.start({{}})\n"
        "for i in range(100): t.log({'train/loss': float(i)}, i)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(read_metrics(tmp_path / "m.jsonl")) == 100


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
