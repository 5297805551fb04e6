"""The cells of docs/python.ipynb run, one after the other."""

import json
import runpy
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "python.ipynb"


def test_the_notebook_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not any(cell.get("outputs") for cell in cells)
    (tmp_path / "notebook.py").write_text("\n\n".join(code), "utf-8")
    runpy.run_path(str(tmp_path / "notebook.py"))
    assert "perplexity" in capsys.readouterr().out
