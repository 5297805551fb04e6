"""The real wandb package, offline: the content of its files, kills, resumes, and the mode."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import hqqtrain
from hqqtrain.config.infra import TrackConfig
from hqqtrain.tracking import wandb_mode
from hqqtrain.tracking.wandb import WandbTracker, read_run_id, save_run_id

pytest.importorskip("wandb", reason="wandb is optional and not installed")
from wandb_file import history_rows, merged_updates, read_records, read_run_records, wandb_files
from wandb_server import FakeWandbServer

ROOT = Path(hqqtrain.__file__).parents[1]
CONFIG = {"quant": {"nbits": 2, "group_size": 64}, "model": {"hub_token": "hf_abcdefghijklmnop"}}
LAYERS = {f"quant/relative_error/model.layers.{i}.mlp.up_proj": 0.1 + i / 100 for i in range(3)}
SUMMARY = {"schema": 1, "eval": {"final": {"perplexity": 9.5, "kl": 0.2}}, "train": {"loss": 2.2}}
pytestmark = pytest.mark.usefixtures("no_account")


def start(run_dir: Path, step: int = 0, **track) -> WandbTracker:
    tracker = WandbTracker(run_dir, TrackConfig(project="hqqtrain-test", **track))
    tracker.start(CONFIG, step)
    return tracker


def test_an_offline_run_has_config_metrics_table_summary_and_plots(tmp_path, capfd):
    run_dir = tmp_path / "tiny_2bit-abc"
    run_dir.mkdir()
    image = picture(tmp_path)
    tracker = start(run_dir)
    tracker.log(LAYERS, 0)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 3.0 / step, "train/learning_rate": 1e-3}, step)
    tracker.log({"eval/perplexity": 9.5}, 3)
    tracker.log_images({"loss": image})
    tracker.log_summary(SUMMARY)
    tracker.finish(0)

    found = read_run_records(run_dir)
    rows = history_rows(found)
    losses = {r["train/global_step"]: r["train/loss"] for r in rows if "train/loss" in r}
    assert losses == {1: 3.0, 2: 1.5, 3: 1.0}
    assert [r["eval/perplexity"] for r in rows if "eval/perplexity" in r] == [9.5]
    assert LAYERS.items() <= rows[0].items()
    assert rows[0]["quant/relative_errors"] == "table-file"
    assert [r["report/loss"] for r in rows if "report/loss" in r] == ["image-file"]

    assert all("hf_abcdefghijklmnop" not in str(record) for record in found)
    assert merged_updates(found, "config")["quant"] == CONFIG["quant"]
    assert (
        merged_updates(found, "summary").items()
        >= {"eval.final.kl": 0.2, "train.loss": 2.2}.items()
    )
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0]
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.project) == ("tiny_2bit-abc", "hqqtrain-test")
    assert run.run_id == (run_dir / "wandb" / "run_id").read_text()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def picture(folder: Path) -> Path:
    from hqqtrain.report.plots import plot_perplexities

    figure = plot_perplexities({"quantized": 2.0})
    assert figure is not None
    figure.savefig(folder / "loss.png")
    return folder / "loss.png"


def run_of(file: Path):
    (run,) = [r.run for r in read_records(file) if r.WhichOneof("record_type") == "run"]
    return run


def loss_of(step: int) -> dict[str, float]:
    return {"train/loss": 1.0 / step}


def test_a_resumed_offline_run_is_a_second_file_with_the_same_id(tmp_path):
    folder = tmp_path / "run"
    run_in_two_processes(folder)
    first, second = wandb_files(folder)
    assert first.parent != second.parent
    assert {run_of(first).run_id, run_of(second).run_id} == {read_run_id(folder)}
    steps = [
        [row["train/global_step"] for row in history_rows(read_records(f))] for f in (first, second)
    ]
    assert steps == [[1, 2, 3], [3, 4]]


def run_in_two_processes(folder: Path) -> None:
    """Log steps 1 to 3, then resume from a checkpoint of step 2 and log steps 3 and 4."""
    for step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = start(folder, step)
        for number in steps:
            tracker.log(loss_of(number), number)
        tracker.finish(0)
        time.sleep(1.0)  # the names of the files have a resolution of one second


def test_wandb_sync_makes_one_run_of_both_files(tmp_path):
    run_in_two_processes(tmp_path / "run")
    tracker = start(tmp_path / "other")
    *settings, program, command, paths = (tracker.hint() or "").removeprefix("W&B: ").split()
    tracker.finish(0)
    assert (program, command, settings) == ("wandb", "sync", ["WANDB_RESUME=allow"])
    folders = tmp_path.glob(paths.removeprefix(f"{tmp_path}/").replace("other", "run"))
    with FakeWandbServer() as server:
        environment = dict(setting.split("=") for setting in settings) | server.environment()
        done = subprocess.run(
            [sys.executable, "-m", "wandb", command, *map(str, folders)],
            env=os.environ | environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        received = [(row["train/global_step"], row["train/loss"]) for row in server.rows()]
        assert sorted(set(received)) == [(n, pytest.approx(1.0 / n)) for n in (1, 2, 3, 4)]


def test_group_and_job_type_come_from_the_configuration(tmp_path):
    tracker = WandbTracker(tmp_path, TrackConfig(project="p", group="sweep-7"))
    tracker.start({"task": "quantize"})
    tracker.finish(0)
    run = run_of(*wandb_files(tmp_path))
    assert (run.run_group, run.job_type) == ("sweep-7", "quantize")


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_adapter_is_an_artifact_if_enabled(tmp_path, is_enabled):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    tracker = start(tmp_path / "a+b", artifacts=is_enabled)
    tracker.log_artifact(adapter)
    tracker.finish(0)
    (file,) = wandb_files(tmp_path / "a+b")
    found = [r.artifact for r in read_records(file) if r.WhichOneof("record_type") == "artifact"]
    assert [(a.name, a.type) for a in found] == ([("a-b-adapter", "model")] if is_enabled else [])
    for artifact in found:
        paths = {entry.path: entry.local_path for entry in artifact.manifest.contents}
        assert paths == {file.name: str(file) for file in adapter.iterdir()}


def test_a_saved_id_is_used_and_a_damaged_one_is_ignored(tmp_path):
    assert read_run_id(tmp_path) is None
    save_run_id(tmp_path, "abc123")
    assert read_run_id(tmp_path) == "abc123"
    tracker = start(tmp_path)
    tracker.finish(0)
    assert run_of(*wandb_files(tmp_path)).run_id == "abc123"
    for damaged in ("", "not an id", "\0\0\0"):
        (tmp_path / "wandb" / "run_id").write_text(damaged)
        assert read_run_id(tmp_path) is None
    (tmp_path / "wandb" / "run_id").unlink()
    os.mkfifo(tmp_path / "wandb" / "run_id")
    assert read_run_id(tmp_path) is None


def test_a_killed_process_leaves_a_readable_file_and_no_process(tmp_path):
    code = (
        "import time; from pathlib import Path; from hqqtrain.tracking.wandb import WandbTracker\n"
        "from hqqtrain.config.infra import TrackConfig\n"
        f"t = WandbTracker(Path({str(tmp_path)!r}), TrackConfig()); t.start({{}})\n"
        "for i in range(2000): t.log({'train/loss': float(i)}, i); time.sleep(0.03)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    files = tmp_path.glob
    wait_until(lambda: any(f.stat().st_size > 7 for f in files("wandb/*run-*/*.wandb")))
    wait_until(lambda: bool(history_rows(read_run_records(tmp_path))))
    helpers = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    rows = history_rows(read_run_records(tmp_path))
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


def test_a_missing_package_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker = start(tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.log_summary(SUMMARY)
    tracker.log_images({})
    tracker.finish(0)
    assert "wandb is not installed" in caplog.text
    assert not (tmp_path / "wandb").exists()


def test_mode_depends_on_key_network_and_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(wandb_mode, "is_server_reachable", lambda: True)
    assert wandb_mode.choose_wandb_mode() == "offline"
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password key\n")
    assert wandb_mode.choose_wandb_mode() == "online"
    (tmp_path / "no-netrc").write_text("broken netrc file\n")
    assert wandb_mode.choose_wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode.choose_wandb_mode() == "online"
    monkeypatch.setattr(wandb_mode, "is_server_reachable", lambda: False)
    assert wandb_mode.choose_wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode.choose_wandb_mode() == "online"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_mode.choose_wandb_mode() == "disabled"


def _write_settings(folder: Path, *lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings").write_text("\n".join(["[default]", *lines, ""]))


def test_the_server_of_wandb_login_is_used(monkeypatch, tmp_path, caplog):
    """`wandb login --host` saves the server in the user's settings, and the key in netrc."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_mode, "is_server_reachable", lambda: True)
    (tmp_path / "no-netrc").write_text("machine wandb.mine:80 login user password key\n")
    with caplog.at_level("INFO"):
        assert wandb_mode.choose_wandb_mode() == "offline"
    assert "no key for api.wandb.ai" in caplog.text
    _write_settings(tmp_path / "home" / ".config" / "wandb", "base_url = https://wandb.mine:80/50%")
    assert (wandb_mode.wandb_server(), wandb_mode.choose_wandb_mode()) == (
        "https://wandb.mine:80/50%",
        "online",
    )
    _write_settings(tmp_path / "elsewhere", "base_url = https://other")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "elsewhere"))
    assert wandb_mode.wandb_server() == "https://other"
    _write_settings(tmp_path / "wandb", "base_url = https://wandb.mine:80", "mode = offline")
    assert (wandb_mode.wandb_server(), wandb_mode.choose_wandb_mode()) == (
        "https://wandb.mine:80",
        "offline",
    )
    (tmp_path / "elsewhere" / "settings").write_text("no section")
    assert wandb_mode.wandb_server() == "https://api.wandb.ai"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine:80")
    assert wandb_mode.choose_wandb_mode() == "online"


def test_wandb_finds_the_same_server_in_its_settings(monkeypatch, tmp_path):
    import wandb

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "mine"))
    _write_settings(tmp_path / "mine", "base_url = https://wandb.mine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    try:
        assert wandb.setup().settings.base_url == wandb_mode.wandb_server()
    finally:
        wandb.teardown()


def test_the_users_disabled_mode_is_respected(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = start(tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish(0)
    assert not list(tmp_path.glob("wandb/*run-*"))
