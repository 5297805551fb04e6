"""The choices of the group `quant` are those of the code, and solvers have what they need."""

import pytest

from hqqtrain.config.quant import CALIBRATED_SOLVERS, QuantConfig
from hqqtrain.quant.solvers import registry


def test_solvers_that_calibrate_are_those_of_the_registry():
    calibrating = {name for name, solver in registry.SOLVERS.items() if solver.calibrates}
    assert set(CALIBRATED_SOLVERS) == calibrating


@pytest.mark.parametrize(("settings", "where"), [
    ({"solver": "gptq", "calibration": None}, ["quant.solver"]),
    ({"overrides": {"q_proj": {"solver": "gptq"}, "k_proj": None}, "calibration": None},
     ["quant.overrides[q_proj].solver"]),
    ({"solver": "gptq", "calibration": "auto"}, []),
    ({"solver": "least_squares"}, []),
])  # fmt: skip
def test_gptq_needs_text(settings: dict, where: list[str]):
    messages = list(QuantConfig(**settings).errors())
    assert [message.partition("=gptq: needs text")[0] for message in messages] == where


@pytest.mark.parametrize(("settings", "solvers"), [
    ({}, {8: "hqq", 4: "gptq", 3: "gptq", 2: "gptq", 1: "gptq"}),
    ({"calibration": None},
     {8: "hqq", 4: "hqq", 3: "least_squares", 2: "least_squares", 1: "least_squares"}),
    ({"solver": "rtn"}, dict.fromkeys((8, 4, 2), "rtn")),
    ({"solver": "gptq"}, {8: "gptq"}),
])  # fmt: skip
def test_auto_is_the_best_solver_for_the_bits(settings: dict, solvers: dict[int, str]):
    config = QuantConfig(**settings)
    assert {nbits: config.solver_for(nbits) for nbits in solvers} == solvers


@pytest.mark.parametrize(("settings", "calibrates"), [
    ({}, True), ({"nbits": 8}, False), ({"calibration": None}, False), ({"solver": "hqq"}, False),
    ({"nbits": 8, "overrides": {"q_proj": {"nbits": 2}}}, True),
    ({"solver": "rtn", "overrides": {"q_proj": {"solver": "least_squares"}, "k_proj": None}}, True),
])  # fmt: skip
def test_text_is_used_if_a_solver_looks_at_it(settings: dict, calibrates: bool):
    assert QuantConfig(**settings).calibrates is calibrates


def test_overrides_may_choose_integer_zeros():
    assert list(QuantConfig(overrides={"q_proj": {"zero": "integer"}}).errors()) == []
    (message,) = QuantConfig(overrides={"q_proj": {"zero": "int"}}).errors()
    assert message == "quant.overrides[q_proj].zero=int: allowed are float, integer."
