"""An export is measured in steps of the groups, and refused past a limit."""

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.formats.comparison import ExportComparison, compare_layer


def _layer(name: str, error: float):
    ours, steps = torch.ones(2, 4), torch.full((2, 4), 0.5)
    theirs = ours.clone()
    theirs[1, 2] += error
    return compare_layer(name, ours, theirs, steps, [torch.zeros(3, dtype=torch.uint8)])


def test_errors_are_in_steps():
    layer = _layer("a", 0.05)
    assert layer.max_error == pytest.approx(0.1, rel=1e-5)
    assert layer.squared_error == pytest.approx(0.0025, rel=1e-5)
    assert (layer.squared_norm, layer.weights, layer.bytes) == (8, 8, 3)
    assert [_layer("x", e).kind for e in (0, 0.1, 0.2)] == ["exact", "rounded", "approximate"]


def test_the_sum_of_the_layers():
    comparison = ExportComparison((_layer("a", 0), _layer("b", 0.2), _layer("c", 0.05)))
    assert comparison.counts == {"exact": 1, "rounded": 1, "approximate": 1}
    assert comparison.worst.name == "b"
    assert comparison.max_error == pytest.approx(0.4, rel=1e-5)
    assert comparison.relative_error == pytest.approx((0.04 + 0.0025) / 24, rel=1e-5)
    assert comparison.bits_per_weight == 3
    assert repr(comparison) == (
        "ExportComparison(exact=1, rounded=1, approximate=1, max_error=0.4)"
    )


def test_a_limit_names_the_worst_layer():
    comparison = ExportComparison((_layer("a", 0), _layer("b", 0.2)))
    comparison.check(None)
    comparison.check(0.5)
    with pytest.raises(UserError, match=r"export\.max_error=0\.3: a weight of b is off by 0\.4 st"):
        comparison.check(0.3)


def test_nothing_is_quantized():
    comparison = ExportComparison(())
    assert (comparison.worst, comparison.max_error, comparison.relative_error) == (None, 0, 0)
    assert comparison.bits_per_weight is None
    comparison.check(0.0)
