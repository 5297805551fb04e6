"""A run goes on without its console, and its exit code and status.json agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENVIRONMENT, fake_task_module

LOST = ["| true", "2>&1 | head -c 1", ">/dev/full 2>&1", ">&- 2>&-"]
"""Shell redirections to a reader that ends early, to a full disk, and to closed streams."""

CHATTY_TASK = """
import pathlib, sys
def run_task(config, command):
    folder = pathlib.Path(config.run.root) / config.run_name()
    folder.mkdir(parents=True)
    for _ in range(5):
        print("out" * 50_000, flush=True)
        print("err" * 50_000, file=sys.stderr, flush=True)
    (folder / "status.json").write_text('{"status": "done"}')
    return 3 if config.quant.nbits == 8 else 0
"""


def _hqqtrain(words: str, redirection: str, folder: Path, **env: str) -> int:
    """Return the exit code of the command, not of the reader of its output."""
    command = f"{sys.executable} -m hqqtrain {words} {redirection}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, timeout=300, env={**os.environ, **ENVIRONMENT, **env}
    ).returncode


@pytest.mark.parametrize("redirection", LOST)
def test_the_exit_code_is_that_of_the_task(redirection: str, tmp_path: Path):
    env = fake_task_module(tmp_path / "fake", CHATTY_TASK)
    for nbits, code in ((4, 0), (8, 3)):
        words = f"quant.nbits={nbits} run.name=run{nbits}"
        assert _hqqtrain(words, redirection, tmp_path, **env) == code
        assert (tmp_path / f"runs/run{nbits}/status.json").exists()


@pytest.mark.parametrize("redirection", LOST)
def test_a_sweep_runs_all_of_its_jobs(redirection: str, tmp_path: Path):
    env = fake_task_module(tmp_path / "fake", CHATTY_TASK)
    assert _hqqtrain("-m quant.nbits=2,4", redirection, tmp_path, **env) == 0
    assert len([*tmp_path.glob("runs/*/status.json")]) == 2
    assert len([*tmp_path.glob("runs/sweep-*/results.csv")]) == 1


def test_a_real_run_ends_and_says_so_in_its_directory(tmp_path: Path):
    words = "task=quantize quant.solver=rtn run.name=run"
    assert _hqqtrain(words, "2>&1 | true", tmp_path) == 0
    status = json.loads((tmp_path / "runs" / "run" / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("done", 0)


def test_text_that_only_serves_to_be_read_must_be_written(tmp_path: Path):
    assert _hqqtrain("--help", ">/dev/full 2>&1", tmp_path) == 1
    assert _hqqtrain("--help", "| true", tmp_path) == 0  # the reader has seen enough


ABORTING_TASK = """
import atexit, os, sys, types
sys.modules["torch"] = types.ModuleType("torch")

def run_task(config, command):
    atexit.register(os.abort)
    print("the last words", end="")
    return 3
"""


def test_a_library_that_aborts_at_the_end_does_not_change_the_exit_code(tmp_path: Path):
    env = fake_task_module(tmp_path / "fake", ABORTING_TASK)
    assert _hqqtrain("run.name=run", "> out", tmp_path, **env) == 3
    assert (tmp_path / "out").read_text().endswith("the last words")
