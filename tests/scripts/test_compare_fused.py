"""`scripts/compare_fused.py` finds differences at single steps and in the mean."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_fused.py"


def test_differences():
    between = runpy.run_path(str(SCRIPT))["Difference"].between
    assert between([3.0] * 20, [3.0] * 20) == (0.0, 0.0)
    found = between([5.0, *[3.0] * 10], [6.0, *[3.0] * 9, 2.0])
    assert found.largest == 1.0
    assert found.last == pytest.approx(0.1)
