"""The predictions of docs/scaling.md stay near the measurements and are consistent."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
assert spec
assert spec.loader
scaling = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


@pytest.mark.parametrize(
    "each", [scaling.FITTED_TO, *scaling.OTHERS], ids=lambda each: f"{each.model}-{each.gpus}"
)
def test_near_what_was_measured(each):
    found = scaling.predict(each.model, each.nbits, each.group_size, each.card, each.gpus)
    assert found.seconds == pytest.approx(each.seconds, rel=0.16)
    assert found.gib == pytest.approx(each.gib, rel=0.05)
    assert (found.received_gib > 0) == (found.wire > 0) == (each.gpus > 1)


def test_more_gpus_hold_less_and_receive_more():
    name = scaling.FITTED_TO.model
    found = [scaling.predict(name, 2, 64, scaling.H100, gpus) for gpus in (1, 8, 64, 1024)]
    assert [p.gib for p in found] == sorted((p.gib for p in found), reverse=True)
    assert [p.received_gib for p in found] == sorted(p.received_gib for p in found)
    assert len({p.work for p in found}) == 1
    packed = 68.45e9 * 2.5 / 8 / 2**30
    assert 2 * packed < found[-1].received_gib < 2 * packed + 5
