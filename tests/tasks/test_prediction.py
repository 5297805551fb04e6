"""Predictions of memory and speed, without a weight."""

from dataclasses import replace

import pytest
from plans import new_predictor, planned_config

from hqqtrain.common.errors import UserError
from hqqtrain.config.activation_checkpointing import count_recomputed
from hqqtrain.config.model import ModelConfig
from hqqtrain.tasks.prediction import Predictor
from hqqtrain.tasks.resources import workload_of


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return new_predictor()


def test_a_gpu_gets_bf16_and_a_speed(predictor: Predictor):
    plan = predictor.predict(planned_config())
    assert (plan.strategy, plan.precision, plan.num_layers) == ("single", "bf16", 6)
    assert plan.parameters == pytest.approx(5.8e6, rel=0.02)
    assert plan.fits
    assert plan.workload.activation_checkpointing == "none"
    time = plan.times["H100"]
    assert plan.mfu("H100") == pytest.approx(time.tokens_per_second * plan.flops_per_token / 989e12)


def test_several_gpus_share_the_model_and_the_batch(predictor: Predictor):
    config = planned_config(gpus=8)
    plan = predictor.predict(config)
    assert (plan.strategy, plan.workload.micro_batch_size) == ("fsdp2", 1)
    alone = predictor.predict(planned_config())
    assert plan.memory.device["packed weights"] == alone.memory.device["packed weights"] // 8
    with pytest.raises(UserError, match="must be a multiple of the 3 processes"):
        predictor.predict(planned_config(gpus=3))


def test_auto_recomputes_as_few_layers_as_the_memory_needs(predictor: Predictor):
    config, modes = planned_config(), []
    config.eval.source = None
    peak = predictor.predict(config).memory.peak
    for share in (1.2, 1.0, 0.8, 0.1):
        usable = peak * share / 0.9 + 0.85 * 2**30
        config.plan.gpu = f"{usable / 2**30:.6f}GiB"
        modes.append(predictor.predict(config).workload.activation_checkpointing)
    numbers = [count_recomputed(mode, 6) for mode in modes]
    assert numbers[0] == 0
    assert numbers == sorted(numbers)
    assert (modes[0], modes[-1]) == ("none", "full")
    assert 0 < numbers[2] < 6


def test_the_settings_are_those_that_the_training_would_have(predictor: Predictor):
    config = planned_config()
    config.parallel.offload, config.parallel.strategy = "parameters", "fsdp2"
    config.train.activation_checkpointing = "offload"
    plan = predictor.predict(config)
    assert plan.workload == workload_of(config, offloads_activations=True)
    assert plan.memory.host > plan.memory.device["packed weights"] == 0
    assert plan.times["H100"].communication > 0


def test_weights_need_not_be_there(predictor: Predictor, tmp_path):
    from hqqtrain.models.source import TINY_FOLDER

    (tmp_path / "config.json").write_text((TINY_FOLDER / "config.json").read_text())
    config = replace(planned_config(), model=ModelConfig(name_or_path=str(tmp_path)))
    assert predictor.predict(config).fits
