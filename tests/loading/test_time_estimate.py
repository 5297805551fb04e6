"""The time of a step follows from its work, and is near what was measured."""

from dataclasses import replace

import pytest
import torch
from memory_estimates import estimate, meta_model, two_bit_config
from torch import nn

from hqqtrain.common.gpus import GPUS, Gpu
from hqqtrain.config.groups import EvalConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.registry import STRATEGIES
from hqqtrain.loading.time_estimate import TimeEstimate, estimate_time
from hqqtrain.tasks.resources import workload_of

TOKENS_PER_SECOND = {
    ("auto", 4, "full"): 12_792, ("auto", 2, "full"): 12_923,
    ("auto", 4, "none"): 16_761, ("auto", 2, "none"): 16_948,
    ("false", 4, "full"): 7_300, ("false", 4, "none"): 10_200,
}  # fmt: skip
"""(train.fused, quant.nbits, train.activation_checkpointing) -> tokens/s, measured on one H200:
Llama 3 8B, g64, r=16, 4 x 2048 tokens, torch 2.11; with fused blocks on 2026-12-01, without them
with commit 9747aad on 2026-11-29."""


def _estimated(
    config: RunConfig, model: nn.Module, gpu: Gpu = GPUS["H200"], strategy: str = "single",
    world_size: int = 1,
) -> TimeEstimate:  # fmt: skip
    memory = estimate(config, model, torch.bfloat16, world_size, strategy)
    time = estimate_time(
        workload_of(config), model, STRATEGIES[strategy](SINGLE_PROCESS), memory, gpu,
        dtype=torch.bfloat16, world_size=world_size,
    )  # fmt: skip
    assert time is not None
    return time


def test_the_speed_of_an_8b_model_is_the_measured_one():
    config = two_bit_config(eval=EvalConfig(source=None))
    config.train.micro_batch_size = config.train.global_batch_size = 4
    models = {}
    for config.quant.nbits in (4, 2):
        models[config.quant.nbits] = meta_model("Meta-Llama-3-8B", config)
    for (fused, nbits, mode), speed in TOKENS_PER_SECOND.items():
        config.train.fused, config.train.activation_checkpointing = fused, mode
        time = _estimated(config, models[nbits])
        assert time.limit in time.parts
        assert time.tokens_per_second == pytest.approx(speed, rel=0.15)


def test_small_steps_wait_for_launches_and_slow_links_for_parameters():
    config = two_bit_config()
    model = meta_model("Meta-Llama-3-8B", config)
    config.train.micro_batch_size, config.train.max_seq_len = 1, 128
    assert _estimated(config, model).limit == "launches"
    config.train.max_seq_len, slow = 2048, replace(GPUS["H200"], link=1e9)
    assert _estimated(config, model, slow, "fsdp2", world_size=8).limit == "communication"


def test_more_gpus_share_the_sequences_of_a_step():
    config = two_bit_config()
    model = meta_model("Meta-Llama-3-8B", config)
    config.train.global_batch_size, config.train.micro_batch_size = 8, 1
    alone, shared = _estimated(config, model), _estimated(config, model, world_size=8)
    assert shared.tokens == alone.tokens == 8 * config.train.max_seq_len
    assert shared.parts["products"] == pytest.approx(alone.parts["products"] / 8)


def test_the_speed_of_an_unknown_gpu_is_unknown():
    config = two_bit_config()
    model = meta_model("tiny", config)
    time = estimate_time(
        workload_of(config), model, STRATEGIES["single"](SINGLE_PROCESS),
        estimate(config, model, torch.bfloat16), Gpu(24 * 10**9),
        dtype=torch.bfloat16, world_size=1,
    )  # fmt: skip
    assert time is None
