"""The choices of the group `quant` are those of the code, and solvers have what they need."""

import pytest

from hqqtrain.config.quant import CALIBRATED_SOLVERS, QuantConfig
from hqqtrain.quant.solvers import registry


def test_solvers_that_calibrate_are_those_of_the_registry():
    calibrating = {name for name, solver in registry.SOLVERS.items() if solver.calibrates}
    assert set(CALIBRATED_SOLVERS) == calibrating


@pytest.mark.parametrize(("settings", "where"), [
    ({"solver": "gptq"}, ["quant.solver"]),
    ({"overrides": {"q_proj": {"solver": "gptq"}, "k_proj": None}},
     ["quant.overrides[q_proj].solver"]),
    ({"solver": "gptq", "calibration": "auto"}, []),
    ({"solver": "least_squares"}, []),
])  # fmt: skip
def test_gptq_needs_text(settings: dict, where: list[str]):
    messages = list(QuantConfig(**settings).errors())
    assert [message.partition("=gptq: needs text")[0] for message in messages] == where


def test_overrides_may_choose_integer_zeros():
    assert list(QuantConfig(overrides={"q_proj": {"zero": "integer"}}).errors()) == []
    (message,) = QuantConfig(overrides={"q_proj": {"zero": "int"}}).errors()
    assert message == "quant.overrides[q_proj].zero=int: allowed are float, integer."
