"""metrics.jsonl: strict JSON, one row per line, whatever kills the process that wrote it."""

import json
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
from hqqtrain.tracking import jsonl as module
from hqqtrain.tracking.jsonl import JsonlTracker, read_metrics

ROOT = Path(hqqtrain.__file__).parents[1]


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


def test_rows_of_a_step_are_merged_in_the_order_of_steps(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [
        {"train/global_step": 2, "train/loss": 2.0},
        {"train/global_step": 0, "eval/loss": 5.0},
        {"train/global_step": 2, "eval/loss": 4.0, "train/loss": 1.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == [lines[1], lines[2]]


@pytest.mark.parametrize("tail", ["", '{"train/global_step": 1', '{"train/global_step": 1}', "\0"])
def test_an_incomplete_last_line_is_skipped(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    path.write_text('{"train/global_step": 0, "time": 1}\n' + tail)
    assert read_metrics(path) == [{"train/global_step": 0, "time": 1}]


def test_a_tracker_that_was_never_started_may_finish(tmp_path):
    tracker = JsonlTracker(tmp_path / "m.jsonl")
    tracker.log_summary({})
    tracker.log_images({})
    tracker.log_artifact(tmp_path)
    tracker.finish(1)
    tracker.finish(1)
    assert tracker.hint() is None
    assert list(tmp_path.iterdir()) == []


HOSTILE_LINES = {
    "text": b"not json",
    "list": b"[1]",
    "number": b"5",
    "no step": b'{"train/loss": 1}',
    "text as step": b'{"train/global_step": "1", "train/loss": 1}',
    "list as step": b'{"train/global_step": [], "train/loss": 1}',
    "truth as step": b'{"train/global_step": true}',
    "huge step": b'{"train/global_step": 1e400}',
    "text as metric": b'{"train/global_step": 1, "train/loss": "x"}',
    "nan": b'{"train/global_step": 1, "train/loss": NaN}',
    "huge metric": b'{"train/global_step": 1, "train/loss": 1e308}',
    "huge integer": b'{"train/global_step": 1, "train/loss": 1' + b"0" * 400 + b"}",
    "too many digits": b'{"train/global_step": 1, "train/loss": ' + b"9" * 5000 + b"}",
    "nested": b'{"train/global_step": 1, "a": ' + b"[" * 100_000,
    "not UTF-8": b"\xff\xfe\x00",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE_LINES)
def test_a_damaged_line_is_skipped_and_removed(tmp_path, name):
    path = tmp_path / "m.jsonl"
    good = [json.dumps({"train/global_step": step, "train/loss": 1.0}) for step in (1, 2)]
    lines = [good[0].encode(), HOSTILE_LINES[name], good[1].encode(), b""]
    path.write_bytes(b"\n".join(lines))
    assert [row["train/global_step"] for row in read_metrics(path)] == [1, 2]
    jsonl(path, step=2).finish(0)
    assert path.read_text().splitlines() == good


def test_a_line_of_any_length_needs_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_LINE_BYTES", 100)
    path = tmp_path / "m.jsonl"
    good = json.dumps({"train/global_step": 1, "train/loss": 1.0})
    path.write_text("x" * 1000 + "\n" + good + "\n")
    assert len(read_metrics(path)) == 1


def test_a_fifo_or_a_link_is_no_metrics_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="regular file"):
        read_metrics(tmp_path / "fifo")
    for name in ("fifo", "link"):
        with pytest.raises(OSError, match=r"link|regular"):
            jsonl(tmp_path / name, step=1)
    assert (tmp_path / "victim").read_text() == "mine"
