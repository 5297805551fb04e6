"""The predictions of docs/scaling.md stay near the measurements and are consistent."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
assert spec
assert spec.loader
scaling = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


@pytest.mark.parametrize(
    "each", [scaling.FITTED_TO, *scaling.OTHERS], ids=lambda each: f"{each.model}-{each.gpus}"
)
def test_near_what_was_measured(each):
    predicted = scaling.predict(each.model, each.nbits, each.group_size, each.card, each.gpus)
    assert predicted.seconds == pytest.approx(each.seconds, rel=0.16)
    assert predicted.gib == pytest.approx(each.gib, rel=0.05)
    assert (predicted.received_gib > 0) == (predicted.wire > 0) == (each.gpus > 1)


def test_the_committed_page_has_the_text_of_the_script():
    page = scaling.PAGE.read_text(encoding="utf-8")
    for text in scaling.TEXT.replace("{table}", "{checks}").split("{checks}"):
        assert text.strip() in page


def test_more_gpus_hold_less_and_receive_more():
    name = scaling.FITTED_TO.model
    predicted = [scaling.predict(name, 2, 64, scaling.H100, gpus) for gpus in (1, 8, 64, 1024)]
    assert [p.gib for p in predicted] == sorted((p.gib for p in predicted), reverse=True)
    assert [p.received_gib for p in predicted] == sorted(p.received_gib for p in predicted)
    assert len({p.work for p in predicted}) == 1
    packed = 68.45e9 * 2.5 / 8 / 2**30
    assert 2 * packed < predicted[-1].received_gib < 2 * packed + 5
