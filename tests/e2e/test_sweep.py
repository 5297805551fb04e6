"""Sweeps as a user starts them: parallel jobs, failures, signals, and resuming."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from runs import SMALL, TIMEOUT, fake_task_module

FAKE_TASK = """
import json, os, pathlib, signal, time

def _meet(root):
    (root / f"here-{os.getpid()}").touch()
    end = time.monotonic() + 30
    while len(list(root.glob("here-*"))) < 2:
        if time.monotonic() > end:
            return 1
        time.sleep(0.02)
    return 0

def _wait_for_a_signal(folder):
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    (folder / "ready").touch()
    first, second = signal.sigwait(signals), signal.sigtimedwait(signals, 0.3)
    (folder / "signal").write_text("twice" if second else str(int(first)))
    return 3

def run_task(config, command):
    folder = pathlib.Path(config.run.root) / config.run_name()
    folder.mkdir(parents=True, exist_ok=True)
    code = {8: 1}.get(config.quant.nbits, 0)
    if config.train.seed == 1:
        code = _meet(folder.parent)
    if config.train.seed == 3:  # a program without signal handlers, which Ctrl-C interrupts
        signal.signal(signal.SIGINT, signal.default_int_handler)
        (folder / "ready").touch()
        time.sleep(60)
    if config.train.seed == 2:
        code = _wait_for_a_signal(folder)
    status = {0: "done", 1: "failed", 3: "preempted"}[code]
    (folder / "status.json").write_text(json.dumps({"status": status}))
    print("threads", os.environ.get("OMP_NUM_THREADS"), *command, flush=True)
    return code
"""


@pytest.fixture
def fake(tmp_path) -> dict[str, str]:
    """Return an environment in which the task is a stub, to test the sweep alone."""
    return {**fake_task_module(tmp_path / "fake", FAKE_TASK), "CUDA_VISIBLE_DEVICES": ""}


def start(*words: str, cwd: Path, **env: str) -> subprocess.Popen:
    """Start a sweep in a new process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "hqqtrain", *words], cwd=cwd, env={**os.environ, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, output, errors


def wait_until(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + TIMEOUT
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def results(root: Path) -> list[dict[str, str]]:
    (file,) = root.glob("sweep-*/results.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_each_of_several_parallel_jobs_writes_its_own_log(tmp_path, fake):
    words = ("-m", "quant.nbits=8,2,4", "run.root=out", "launch.max_parallel_jobs=2")
    code, output, errors = finish(start(*words, cwd=tmp_path, **fake | {"OMP_NUM_THREADS": "3"}))
    assert code == 1
    assert "threads" not in output
    logs = re.findall(r"sweep ./3: (.*): started, see (.*)\n", output)
    assert len(logs) == 3
    for given, log in logs:
        text = (tmp_path / log).read_text()
        assert given in ("quant.nbits=8", "quant.nbits=2", "quant.nbits=4"), (
            "the value that identifies the job"
        )
        command = text.splitlines()[0]
        assert command.startswith("$ python -m hqqtrain ")
        assert {given, "run.root=out", "quant.cache_dir=out/quantized"} <= {*shlex.split(command)}
        arguments = command.removeprefix("$ python -m hqqtrain ")
        assert arguments in text.partition("threads 3 ")[2]
    (failed,) = errors.splitlines()
    assert failed == f"hqqtrain: error: {logs[0][0]}: failed; see {logs[0][1]}"
    assert [row["status"] for row in results(tmp_path / "out")] == ["failed", "done", "done"]


def test_two_jobs_run_at_the_same_time(tmp_path, fake):
    """Each job waits until it sees the other."""
    words = ("-m", "quant.nbits=2,4", "train.seed=1", "run.root=out", "launch.max_parallel_jobs=2")
    assert finish(start(*words, cwd=tmp_path, **fake))[0] == 0


@pytest.mark.parametrize(("jobs", "name"), [(2, "TERM"), (2, "USR1"), (2, "INT"), (1, "TERM")])
def test_a_signal_reaches_every_job_once_and_no_other_job_starts(tmp_path, fake, jobs, name):
    words = (
        "-m",
        "quant.nbits=2,3,4",
        "train.seed=2",
        "run.root=out",
        f"launch.max_parallel_jobs={jobs}",
    )
    process = start(*words, cwd=tmp_path, **fake)
    wait_until(lambda: len(list(tmp_path.glob("out/*/ready"))) == jobs, process)
    sent = signal.Signals[f"SIG{name}"]
    os.killpg(process.pid, sent)  # as a terminal does
    code, output, _ = finish(process)
    assert code == 3
    assert len(list(tmp_path.glob("out/*/ready"))) == jobs
    assert {f.read_text() for f in tmp_path.glob("out/*/signal")} == {str(int(sent))}
    assert output.count(": preempted (") == jobs
    states = ["preempted"] * jobs + ["pending"] * (3 - jobs)
    assert [row["status"] for row in results(tmp_path / "out")] == states


def test_a_job_that_ctrl_c_interrupts_is_preempted(tmp_path, fake):
    process = start("-m", "quant.nbits=2,3", "train.seed=3", "run.root=out", cwd=tmp_path, **fake)
    wait_until(lambda: len(list(tmp_path.glob("out/*/ready"))) == 1, process)
    os.killpg(process.pid, signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 3
    assert "failed" not in output + errors
    assert [row["status"] for row in results(tmp_path / "out")] == ["preempted", "pending"]


def test_a_table_that_cannot_be_written_is_an_error_at_the_end(tmp_path, fake):
    """Earlier it is only a warning, so that all jobs run."""
    words = ("-m", "quant.nbits=2,4", "run.root=out")
    assert finish(start("--table", *words, cwd=tmp_path, **fake))[0] == 0
    (file,) = tmp_path.glob("out/*/results.csv")
    file.unlink()
    file.mkdir()
    code, output, errors = finish(start(*words, cwd=tmp_path, **fake))
    assert (code, output.count("threads")) == (2, 2)
    assert "bits per" in output, "the table is still printed"
    assert "results.csv" not in output
    *warnings, last = errors.splitlines()
    assert all("was not written" in line for line in warnings)
    assert re.match(r"hqqtrain: error: out/sweep-\S+: the table was not written", last)
    code, _, errors = finish(start("--table", *words, cwd=tmp_path, **fake))
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "the table was not written" in errors


def test_equal_runs_of_a_sweep_run_once(tmp_path, fake):
    words = ("-m", "quant.nbits=2", "track.project=a,b", "run.root=out")
    code, output, _ = finish(start(*words, cwd=tmp_path, **fake))
    assert code == 0
    assert "sweep: track.project=b: skipped, because another job is the same run" in output
    assert len(results(tmp_path / "out")) == 1


def test_table_prints_the_table_without_running_jobs(tmp_path, fake):
    words = ("-m", "quant.nbits=2,4", "run.root=out")
    code, output, _ = finish(start("--table", *words, cwd=tmp_path, **fake))
    assert (code, output.count("pending")) == (0, 2)
    assert finish(start(*words, cwd=tmp_path, **fake))[0] == 0
    code, output, _ = finish(start("--table", *words, cwd=tmp_path, **fake))
    assert (code, output.count("pending"), output.count("done")) == (0, 0, 2)
    code, _, errors = finish(start("--table", "quant.nbits=2", cwd=tmp_path, **fake))
    assert code == 2
    assert "needs the keys of a sweep" in errors


def test_a_sweep_waits_for_jobs_of_a_killed_sweep(tmp_path, fake):
    words = ("-m", "quant.nbits=2,3", "train.seed=2", "run.root=out")
    process = start(*words, cwd=tmp_path, **fake)
    wait_until(lambda: len(list(tmp_path.glob("out/*/ready"))) == 1, process)
    (orphan,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()  # not `communicate`: the orphan has the pipes open, too
    again = start(*words, cwd=tmp_path, **fake)
    assert again.stdout is not None
    assert again.stdout.readline().startswith("sweep: waiting for the jobs of an earlier attempt")
    orphan.terminate()
    assert again.stdout.readline().startswith("sweep 1/2: quant.nbits=2")
    again.terminate()
    assert finish(again)[0] == 3


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, "launch.max_parallel_jobs=2: every job needs its own GPU"),
        ({}, "run.root=there"),
    ],
)
def test_an_impossible_sweep_is_one_message(tmp_path, fake, env, message):
    (tmp_path / "there").write_text("")
    words = ("-m", "quant.nbits=2,4", "launch.max_parallel_jobs=2", "run.root=there")
    code, output, errors = finish(start(*words, cwd=tmp_path, **fake | env))
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert message in errors


TEXT = "def add(a, b):\n    return a + b\n" * 400


def kill_all(process: subprocess.Popen) -> None:
    """Kill the sweep and its jobs, which have process groups of their own."""
    jobs = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *jobs):
        each.kill()
    process.communicate()
    psutil.wait_procs(jobs)


def test_a_killed_sweep_resumes_and_quantizes_once(tmp_path):
    """Real runs, one after the other: one finishes, one is killed in training."""
    root = tmp_path / "runs"
    first, second, held_out = (tmp_path / f"{name}.txt" for name in "abc")
    for file in (first, second):
        file.write_text(TEXT)
    held_out.write_text(TEXT.replace("add", "subtract").replace("+", "-"))
    words = ["-m", *SMALL, f"data.source={first},{second}", f"eval.source={held_out}",
             "train.max_steps=12", f"run.root={root}"]  # fmt: skip
    env = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    process = start(*words, cwd=tmp_path, **env)

    def states() -> list[str]:
        found = list(root.glob("tiny_2bit-*/status.json"))
        return sorted(re.findall(r'"status": "(\w+)"', f.read_text())[0] for f in found)

    wait_until(lambda: states() == ["done", "running"], process)
    kill_all(process)
    assert states() == ["done", "running"], "the second was killed in the middle"
    (done,) = (f for f in root.glob("tiny_2bit-*/status.json") if '"done"' in f.read_text())
    (entry,) = (path for path in (root / "quantized").iterdir() if path.is_dir())
    before = [path.stat().st_mtime_ns for path in (done, entry)]

    code, output, errors = finish(start(*words, cwd=tmp_path, **env))
    assert code == 0, output + errors
    assert "done before" in output
    assert [path.stat().st_mtime_ns for path in (done, entry)] == before, "neither is made again"
    assert [row["status"] for row in results(root)] == ["done"] * 2
    assert [p for p in (root / "quantized").iterdir() if p.is_dir()] == [entry]
    assert "is made now" not in output
    (page,) = root.glob("sweep-*/index.html")
    assert "2 jobs: 2 done" in page.read_text()
