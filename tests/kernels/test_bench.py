"""Every part of the benchmark runs, with toy sizes, by the command that measures real ones."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
def test_one_command_measures_ours_and_the_peers_and_writes_a_csv(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "kernels/bench/run.py", "--smoke", "--csv", "out/rows.csv"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    with (tmp_path / "out/rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"quantize", "dequantize", "linear", "overhead"}
    for part, provider in {
        "quantize": "hqq",
        "linear": "bitsandbytes nf4",
        "overhead": "hqq",
    }.items():
        measured = [row for row in rows if (row["part"], row["provider"]) == (part, provider)]
        assert any(
            float(row["ms"]) > 0 and float(row["ratio"]) > 0 for row in measured if row["ms"]
        )
    # A provider that could not be measured has a row that says why.
    assert all(row["ms"] or row["note"] for row in rows)
    assert all(row["gpu"] and "torch=" in row["versions"] and row["date"] for row in rows)
    output = process.stdout
    assert all(
        f"| {what}" in output for what in ("quantize 70B", "dequantize", "forward", "Python")
    )
    assert "missed, " in output.splitlines()[-1]
