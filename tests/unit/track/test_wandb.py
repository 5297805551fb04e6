"""W&B for real, offline: what its file holds, without a key, a network, a package, or a future."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import hqqtrain
from hqqtrain.config import TrackConfig
from hqqtrain.track import WandbTracker, online

pytest.importorskip("wandb", reason="an optional tracker: absent on some machines")
from wandb.proto.wandb_internal_pb2 import Record

ROOT = Path(hqqtrain.__file__).parents[1]
CONFIG = {"quant": {"nbits": 2, "group_size": 64}, "model": {"hub_token": "hf_abcdefghijklmnop"}}
LAYERS = {f"quant/relative_error/model.layers.{i}.mlp.up_proj": 0.1 + i / 100 for i in range(3)}
SUMMARY = {"schema": 1, "eval": {"final": {"perplexity": 9.5, "kl": 0.2}}, "train": {"loss": 2.2}}


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def records(run_dir: Path) -> list[Record]:
    """Every record of the one .wandb file under `run_dir`."""
    (file,) = run_dir.glob("wandb/*run-*/*.wandb")
    return [Record.FromString(data) for data in leveldb_log(file.read_bytes())]


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The format of .wandb: LevelDB's log, blocks of 32 KiB, after a header of 7 bytes.

    A chunk has a CRC (4), a length (2) and a type (1: whole, 2: first, 3: middle, 4: last).
    """
    assert content[:4] == b":W&B"
    at, pieces = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0 or at + 7 + length > len(content):
            return  # a killed writer's last chunk
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


def history(found: list[Record]) -> list[dict]:
    """The logged rows; what has a dict for a value (a table, an image) gives its `_type`."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = [(item.nested_key or [item.key], item) for item in record.history.item]
            plain = {key[0]: json.loads(item.value_json) for key, item in items if len(key) == 1}
            kinds = {k[0]: json.loads(i.value_json) for k, i in items if k[1:] == ["_type"]}
            rows.append(plain | kinds)
    return rows


def updates(found: list[Record], kind: str) -> dict:
    """The config or the summary as it was last written, nested keys joined by dots."""
    merged = {}
    for record in found:
        name = record.WhichOneof("record_type")
        part = getattr(record, kind) if name == kind else None
        if name == "run":
            part = getattr(record.run, kind)
        for item in part.update if part is not None else []:
            key = item.key or ".".join(item.nested_key)
            merged[key] = json.loads(item.value_json)
    return merged


def start(run_dir: Path, step: int = 0, **track) -> WandbTracker:
    tracker = WandbTracker(run_dir, TrackConfig(project="hqqtrain-test", **track))
    tracker.start(CONFIG, step)
    return tracker


def test_an_offline_run_holds_config_metrics_table_summary_and_plots(tmp_path, capfd):
    run_dir = tmp_path / "tiny_2bit-abc"
    run_dir.mkdir()
    image = picture(tmp_path)
    tracker = start(run_dir)
    tracker.log(LAYERS, 0)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 3.0 / step, "train/learning_rate": 1e-3}, step)
    tracker.log({"eval/perplexity": 9.5}, 3)
    tracker.images({"loss": image})
    tracker.summary(SUMMARY)
    tracker.finish(0)

    found = records(run_dir)
    rows = history(found)
    losses = {r["train/global_step"]: r["train/loss"] for r in rows if "train/loss" in r}
    assert losses == {1: 3.0, 2: 1.5, 3: 1.0}
    assert [r["eval/perplexity"] for r in rows if "eval/perplexity" in r] == [9.5]
    assert LAYERS.items() <= rows[0].items()
    assert rows[0]["quant/relative_errors"] == "table-file"
    assert [r["report/loss"] for r in rows if "report/loss" in r] == ["image-file"]

    assert all("hf_abcdefghijklmnop" not in str(record) for record in found)
    assert updates(found, "config")["quant"] == CONFIG["quant"]
    assert updates(found, "summary").items() >= {"eval.final.kl": 0.2, "train.loss": 2.2}.items()
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0]
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.project) == ("tiny_2bit-abc", "hqqtrain-test")
    assert run.run_id == (run_dir / "wandb" / "run_id").read_text()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def picture(folder: Path) -> Path:
    from hqqtrain.track.plots import perplexity_figure

    figure = perplexity_figure({"quantized": 2.0})
    assert figure is not None
    figure.savefig(folder / "loss.png")
    return folder / "loss.png"


def test_a_resumed_run_keeps_its_id(tmp_path):
    ids = []
    for _ in range(2):
        tracker = start(tmp_path)
        ids.append(tracker._run.id)
        tracker.finish(0)
    assert ids[0] == ids[1]


def test_a_killed_process_leaves_a_readable_file_and_no_process(tmp_path):
    code = (
        "import time; from pathlib import Path; from hqqtrain.track import WandbTracker\n"
        "from hqqtrain.config import TrackConfig\n"
        f"t = WandbTracker(Path({str(tmp_path)!r}), TrackConfig()); t.start({{}})\n"
        "for i in range(2000): t.log({'train/loss': float(i)}, i); time.sleep(0.03)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    files = tmp_path.glob
    wait_until(lambda: any(f.stat().st_size > 7 for f in files("wandb/*run-*/*.wandb")))
    wait_until(lambda: bool(history(records(tmp_path))))
    helpers = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    rows = history(records(tmp_path))
    assert rows
    assert [row["train/loss"] for row in rows] == [float(i) for i in range(len(rows))]
    wait_until(lambda: not any(helper.is_running() for helper in helpers))
    first = (tmp_path / "wandb" / "run_id").read_text()
    tracker = start(tmp_path)
    assert tracker._run.id == first
    tracker.finish(0)


def wait_until(condition: Callable[[], bool], seconds: float = 45.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_package_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker = start(tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.summary(SUMMARY)
    tracker.images({})
    tracker.finish(0)
    assert "wandb is not installed" in caplog.text
    assert not (tmp_path / "wandb").exists()


def test_mode_follows_key_network_and_the_users_word(monkeypatch, tmp_path):
    monkeypatch.setattr(online, "reachable", lambda: True)
    assert online.mode() == "offline"
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password key\n")
    assert online.mode() == "online"
    (tmp_path / "no-netrc").write_text("broken netrc file\n")
    assert online.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert online.mode() == "online"
    monkeypatch.setattr(online, "reachable", lambda: False)
    assert online.mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert online.mode() == "online"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert online.mode() == "disabled"


def test_the_users_disabled_mode_is_respected(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = start(tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish(0)
    assert not list(tmp_path.glob("wandb/*run-*"))
