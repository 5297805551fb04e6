"""A streamed training on two ranks, killed and resumed on one: the same text in every step."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from runs import SMALL, run, run_in_this_process

STEPS = 8


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_run_that_is_killed_on_two_ranks_ends_on_one(tmp_path: Path):
    for name in "ab":
        rows = [json.dumps({"text": f"{name} is the name of row {i}. " * 4}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    source = ", ".join(f"{{path: {tmp_path}/{name}.jsonl, weight: 1}}" for name in "ab")
    words = [
        *(word for word in SMALL if not word.startswith(("data.", "eval.source"))),
        f"data.source=[{source}]", "data.streaming=true", "data.shuffle_buffer=8",
        "data.validation=0.1", "run.name=run", f"train.max_steps={STEPS}", "ckpt.every=2",
        "train.precision=fp32", "train.micro_batch_size=2",
    ]  # fmt: skip
    root, metrics = tmp_path / "runs", tmp_path / "runs" / "run" / "metrics.jsonl"

    def kill(pids: list[int]) -> None:
        end = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("train/loss") < 5:
            assert time.monotonic() < end, "the run did not reach this step"
            time.sleep(0.005)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    assert run(*words, root=root, processes=2, meanwhile=kill).code == -signal.SIGKILL
    resumed = run(*words, root=root)
    assert resumed.code == 0, resumed.output
    assert "resuming from" in resumed.output
    assert run_in_this_process([*words, f"run.root={tmp_path / 'whole'}"]) == 0
    whole = tmp_path / "whole" / "run"
    assert len(losses(whole)) == STEPS
    assert losses(resumed.directory) == pytest.approx(losses(whole), rel=1e-5)
    tokens = json.loads((whole / "summary.json").read_text())["train"]["tokens"]
    assert resumed.summary["train"]["tokens"] == tokens
