"""A W&B server that is silent or dies: a run ends within its timeouts and loses no row."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hqqtrain
from hqqtrain.config.infra import TrackConfig
from hqqtrain.tracking import wandb as tracker_module
from hqqtrain.tracking import wandb_mode
from hqqtrain.tracking.composite import open_trackers
from hqqtrain.tracking.jsonl import read_metrics
from hqqtrain.tracking.wandb import WandbTracker

pytest.importorskip("wandb", reason="wandb is optional and not installed")
from wandb_file import history_rows, read_records, wandb_files
from wandb_server import KEY, FakeWandbServer

ROOT = Path(hqqtrain.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("no_account")


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch):
    monkeypatch.setattr(tracker_module, "INIT_SECONDS", 2.0)
    monkeypatch.setattr(tracker_module, "FINISH_SECONDS", 2.0)


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def use_server(monkeypatch, url: str, mode: str = "") -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)


def offline_steps(run_dir: Path) -> list[int]:
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return [row["train/global_step"] for row in history_rows(read_records(file))]


def test_online_every_row_arrives(monkeypatch, tmp_path):
    with FakeWandbServer() as server:
        use_server(monkeypatch, server.url)
        tracker = WandbTracker(tmp_path, TrackConfig(project="p"))
        tracker.start({})
        for step in (1, 2, 3):
            tracker.log({"train/loss": 1.0 / step}, step)
        assert (tracker.hint() or "").startswith(f"W&B: {server.url}/e/p/runs/")
        tracker.finish(0)
        assert [row["train/global_step"] for row in server.rows()] == [1, 2, 3]


def test_a_resumed_online_run_repeats_no_step(monkeypatch, tmp_path):
    with FakeWandbServer() as server:
        use_server(monkeypatch, server.url)
        for step, steps in ((0, (1, 2, 3)), (1, (2, 3, 4, 5))):
            tracker = WandbTracker(tmp_path, TrackConfig(project="p"))
            tracker.start({}, step)
            for number in steps:
                tracker.log({"train/loss": 1.0 / number}, number)
            tracker.finish(0)
        assert [row["train/global_step"] for row in server.rows()] == [1, 2, 3, 4, 5]


def test_a_server_receives_the_rows_it_has_missed(monkeypatch, tmp_path):
    config = TrackConfig(backends=["wandb"], project="p")

    def process(step: int, *steps: int) -> None:
        trackers = open_trackers(config, tmp_path, {}, step)
        for number in steps:
            trackers.log({"train/loss": 1.0 / number, "train/mfu": float("nan")}, number)
        trackers.finish(1)

    process(0, 1, 2, 3)  # no key: offline
    with FakeWandbServer() as server:
        use_server(monkeypatch, server.url)
        process(2, 3, 4)
        process(3, 4, 5)
        received = [(row["train/global_step"], row["train/loss"]) for row in server.rows()]
    assert received == [(n, pytest.approx(1.0 / n)) for n in (1, 2, 3, 4, 5)]


def test_a_server_that_dies_during_a_run_costs_seconds_and_no_row(monkeypatch, tmp_path, caplog):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with FakeWandbServer() as server:
        use_server(monkeypatch, server.url)
        trackers = open_trackers(TrackConfig(backends=["wandb"], artifacts=True), tmp_path, {})
        trackers.log({"train/loss": 1.0}, 1)
        server.stop()
        began = time.monotonic()
        for step in range(2, 300):
            trackers.log({"train/loss": 1.0}, step)
        assert time.monotonic() - began < 5
        trackers.log_artifact(adapter)
        assert "the adapter was not uploaded" in caplog.text
        trackers.finish(0)
        assert time.monotonic() - began < 15
    (file,) = wandb_files(tmp_path)
    assert [row["train/global_step"] for row in history_rows(read_records(file))] == [
        *range(1, 300)
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 299


@pytest.mark.parametrize("fault", ["silent", "refuses", "has no address"])
def test_a_run_whose_server_fails_is_kept_offline(monkeypatch, tmp_path, caplog, silent, fault):
    url = {"silent": silent, "refuses": "http://127.0.0.1:9"}.get(fault, "https://wandb.invalid")
    use_server(monkeypatch, url, mode="online")  # a given mode skips the test request
    tracker = WandbTracker(tmp_path, TrackConfig(project="p"))
    began = time.monotonic()
    tracker.start({})
    tracker.log({"train/loss": 1.0}, 1)
    assert "WANDB_RESUME=allow wandb sync" in (tracker.hint() or "")
    tracker.finish(0)
    assert time.monotonic() - began < 20
    assert "the run is kept offline" in caplog.text
    assert KEY not in caplog.text
    assert offline_steps(tmp_path) == [1]


def test_a_program_ends_soon_after_a_silent_server(tmp_path, silent):
    code = (
        "from pathlib import Path; from hqqtrain.config.infra import TrackConfig\n"
        "from hqqtrain.tracking.wandb import WandbTracker; from hqqtrain.tracking import wandb\n"
        "wandb.INIT_SECONDS = 2.0\n"
        f"t = WandbTracker(Path({str(tmp_path)!r}), TrackConfig()); t.start({{}})\n"
        "t.log({'train/loss': 1.0}, 1); t.finish(0)\n"
    )
    environment = {"WANDB_BASE_URL": silent, "WANDB_API_KEY": KEY, "WANDB_MODE": "online",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}  # fmt: skip
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, timeout=60)
    assert done.returncode == 0
    assert time.monotonic() - began < 25
    assert offline_steps(tmp_path) == [1]


def test_a_hanging_wandb_process_does_not_block_a_finished_run(tmp_path):
    code = (
        "import psutil; from pathlib import Path; from hqqtrain.config.infra import TrackConfig\n"
        "from hqqtrain.tracking.composite import open_trackers\n"
        "from hqqtrain.tracking import wandb\n"
        "wandb.FINISH_SECONDS = wandb.SLACK_SECONDS = 1.0\n"
        f"t = open_trackers(TrackConfig(backends=['wandb']), Path({str(tmp_path)!r}), {{}})\n"
        "t.log({'train/loss': 1.0}, 1)\n"
        "for child in psutil.Process().children(recursive=True): child.suspend()\n"
        "t.finish(0)\n"
    )
    environment = {"WANDB_MODE": "offline",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, timeout=40,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert "WandbTracker failed and is disabled: the processes wandb-* did not end" in done.stderr


def test_a_server_that_never_answers_costs_seconds(monkeypatch, silent):
    use_server(monkeypatch, silent)
    began = time.monotonic()
    assert wandb_mode.choose_wandb_mode() == "offline"
    assert time.monotonic() - began < wandb_mode.REACH_SECONDS + 1


@pytest.fixture
def slow_names(monkeypatch) -> Iterator[None]:
    """Make host names resolve too late, and wait at the end for the threads that look them up."""
    is_over, before = threading.Event(), threading.active_count()

    def getaddrinfo(*_: object) -> list:
        is_over.wait(30)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    is_over.set()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("slow_names")
def test_a_name_that_never_resolves_costs_seconds():
    began = time.monotonic()
    assert not wandb_mode.is_server_reachable()
    assert time.monotonic() - began < wandb_mode.REACH_SECONDS + 1


def test_an_abandoned_thread_prints_nothing(monkeypatch, capfd):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: None)  # as if Python were shutting down
    assert not wandb_mode.is_server_reachable()
    assert capfd.readouterr().err == ""


def test_a_key_and_a_server_that_answers_mean_online(monkeypatch, caplog):
    with FakeWandbServer() as server, caplog.at_level(logging.WARNING):
        use_server(monkeypatch, server.url)
        assert wandb_mode.choose_wandb_mode() == "online"
        server.stop()
        assert wandb_mode.choose_wandb_mode() == "offline"
    assert f"{server.url} does not answer" in caplog.text
