"""The size of a micro-batch, and the calibration text of a workload."""

import pytest

from hqqtrain.config.run import RunConfig
from hqqtrain.tasks.resources import workload_of


@pytest.mark.parametrize("task", ["finetune", "quantize", "eval", "export"])
def test_only_finetune_trains(task: str) -> None:
    assert workload_of(RunConfig(task=task)).trains == (task == "finetune")


def test_tokens_are_those_of_a_micro_batch() -> None:
    config = RunConfig()
    config.train.micro_batch_size, config.train.max_seq_len = 3, 100
    assert workload_of(config).tokens == 300


@pytest.mark.parametrize(
    ("quant", "tokens"),
    [({}, 65536), ({"nbits": 8}, 0), ({"solver": "rtn"}, 0), ({"calibration": None}, 0),
     ({"nbits": 8, "overrides": {"q_proj": {"nbits": 4}}}, 65536)],
)  # fmt: skip
def test_text_is_needed_only_if_a_solver_looks_at_it(quant: dict, tokens: int) -> None:
    config = RunConfig()
    for key, value in quant.items():
        setattr(config.quant, key, value)
    assert workload_of(config).calibration_tokens == tokens
    assert workload_of(config, has_quantized=True).calibration_tokens == 0
    assert workload_of(config, calibrates=False).calibration_tokens == 0
