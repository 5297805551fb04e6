"""Contenders take turns, and one that ends is an error with its log."""

import csv
import subprocess
import sys
import time

import pytest
from bench_training import HEADER, Contender, measure, save, start, table
from bench_training_inputs import Workload, write_inputs

TRAINS = """
import json, sys, time
while True:
    time.sleep(0.01)
    with open(sys.argv[1], "a") as file:
        row = {"train/tokens_per_second": float(sys.argv[2]), "memory/peak_gib": 1.5}
        file.write(json.dumps(row) + "\\n" + json.dumps({"eval/loss": 1}) + "\\n")
"""


@pytest.fixture
def make_contender(tmp_path):
    started = []

    def make(name: str, speed: float, code: str = TRAINS) -> Contender:
        lines, log = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(lines), str(speed)], stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return Contender(name, process, lines, log)

    yield make
    for process in started:
        process.kill()
        process.wait()


def test_they_take_turns(make_contender, tmp_path):
    contenders = [make_contender("ours", 300.0), make_contender("theirs", 200.0)]
    for contender in contenders:
        contender.run(1)
    time.sleep(0.05)  # the line of a step that the signal met
    stopped = [len(contender.steps()) for contender in contenders]
    time.sleep(0.1)
    assert [len(contender.steps()) for contender in contenders] == stopped
    measure(contenders, rounds=2, steps=2)
    assert [len(contender.measured) for contender in contenders] == [4, 4]
    rows = table(contenders)
    assert rows == [["ours", 300.0, 1.5, 1.5], ["theirs", 200.0, 1.0, 1.5]]
    for _ in range(2):
        save(rows, tmp_path / "speed.csv", "ours theirs")
    with (tmp_path / "speed.csv").open() as file:
        names, *saved = csv.reader(file)
    assert names[: len(HEADER)] == HEADER
    assert [row[0] for row in saved] == ["ours", "theirs", "ours", "theirs"]


def test_one_that_ends_or_hangs_is_an_error(make_contender):
    with pytest.raises(RuntimeError, match=r"(?s)ends took too few steps.*out of memory"):
        make_contender("ends", 1.0, "raise SystemExit('out of memory')").run(1)
    with pytest.raises(RuntimeError, match="hangs took too few steps"):
        make_contender("hangs", 1.0, "import time; time.sleep(60)").run(1, seconds=0.2)


def test_hqqtrain_trains(tmp_path):
    workload = Workload(tmp_path, batch=1, tokens=32, checkpointing="true")
    write_inputs(tmp_path, "small", workload)
    contender = start(
        "hqqtrain:2,data.source=documents.jsonl,OMP_NUM_THREADS=1", workload, tmp_path
    )
    try:
        steps = contender.run(2)
    finally:
        contender.process.kill()
        contender.process.wait()
    assert all(step["tokens_per_second"] > 0 for step in steps)
