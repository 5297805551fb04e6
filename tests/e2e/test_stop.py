"""A signal to one of two ranks, at any time: both end by themselves, with exit code 3."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import SMALL, run, small_data

WORDS = (
    *SMALL, "run.name=run", "train.micro_batch_size=2", "eval.tokens=2048", "eval.reference=off",
)  # fmt: skip
LIMIT = 40
"""Seconds from the signal to the end; a rank that waits for a lost one would take longer."""


def _quantizing(root: Path) -> bool:
    return "estimate: " in (root.parent / "output-0.txt").read_text()


def _training(root: Path) -> bool:
    return _steps(root) >= 2


def _evaluating_at_the_end(root: Path) -> bool:
    return _steps(root) == 4


def _steps(root: Path) -> int:
    file = root / "run" / "metrics.jsonl"
    return file.read_text().count("train/loss") if file.exists() else 0


def _signal_at(
    moment: Callable[[Path], bool], root: Path, rank: int, number: int = signal.SIGUSR1
) -> Callable[[list], None]:
    def send(pids: list[int]) -> None:
        end = time.monotonic() + 120
        while not moment(root):
            assert time.monotonic() < end, "the run did not reach this point"
            time.sleep(0.002)
        os.kill(pids[rank], number)

    return send


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path: Path):
    root = tmp_path / "runs"
    words = (*WORDS, *small_data(tmp_path), "eval.source=null")
    done = run(*words, root=root, meanwhile=_signal_at(_training, root, 0, signal.SIGINT))
    assert done.code == 3, done.output
    assert json.loads((root / "run" / "status.json").read_text())["status"] == "preempted"
    again = run(*words, root=root)
    assert (again.code, _steps(root)) == (0, 4), again.output
    assert "resuming from" in again.output


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", [_quantizing, _training, _evaluating_at_the_end])
def test_all_ranks_end_by_themselves(moment, rank: int, tmp_path: Path):
    root = tmp_path / "runs"
    done = run(*WORDS, *small_data(tmp_path), root=root, processes=2, grace=LIMIT, limit=LIMIT,
               meanwhile=_signal_at(moment, root, rank))  # fmt: skip
    assert done.codes == (3, 3), done.output
    assert (root / "run").exists() == (moment is not _quantizing)
    assert _steps(root) == {_quantizing: 0, _evaluating_at_the_end: 4}.get(moment, _steps(root))
    assert not (root / "run" / "summary.json").exists()
