"""The script compares predictions with measurements, row by row."""

import csv

import check_plan
import pytest
from check_plan import HEADER, ROWS, Row, main


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(check_plan, "ROWS", {"small": Row(2, "full", shape="small", tokens=64)})


def test_a_row_is_predicted_for_a_gpu_that_is_not_there(small, capsys):
    assert main(["small", "--gpu", "H100"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.split()[0] == "small"
    assert line.split()[-1] == "launches"


def test_errors_are_relative_to_the_measurement(small, tmp_path, monkeypatch):
    monkeypatch.setattr(check_plan, "measure", lambda row, workload, folder, steps: (1.0, 1e4))
    monkeypatch.setattr(check_plan, "predict", _on_h100(check_plan.predict))
    assert main(["small", "--csv", str(tmp_path / "rows.csv")]) == 0
    header, row = csv.reader((tmp_path / "rows.csv").open())
    assert header[: len(HEADER)] == HEADER
    assert float(row[3].rstrip("%")) == pytest.approx(100 * (float(row[2]) - 1), abs=0.06)


def _on_h100(predict):
    return lambda row, workload, gpu: predict(row, workload, "H100")


def test_there_are_ten_rows():
    assert len(ROWS) >= 10
