"""A single process resolves what is `auto`, and refuses what does not fit."""

from dataclasses import replace

import pytest
import torch
from accelerate import InitProcessGroupKwargs

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.groups import OptimConfig, TrainConfig
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed import runtime
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings

SETTINGS = RuntimeSettings(
    ParallelConfig(), QuantConfig(), AdapterConfig(), TrainConfig(), OptimConfig(), trains=True
)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _start(**changed: object) -> Runtime:
    return Runtime.start(replace(SETTINGS, **changed), PreemptionHandler(RunDirConfig()))


def test_everything_that_is_auto_is_resolved():
    runtime = _start(
        parallel=ParallelConfig(offload="parameters", strategy="fsdp2"),
        train=TrainConfig(activation_checkpointing="offload"),
    )
    assert runtime.strategy.name == "fsdp2"
    assert (runtime.precision, runtime.dtype) == ("fp32", torch.float32)
    assert not runtime.offloads_activations, "on a CPU they are in host memory anyway"
    assert not runtime.offloads_parameters
    assert _start().strategy.name == "single"


@pytest.mark.parametrize("local_rank", [None, "0"])
def test_only_a_launcher_makes_a_process_group_for_both_devices(local_rank, monkeypatch):
    """accelerate would join the group of a backend that it is given, also where there is none."""
    asked: list[str | None] = []

    def accelerator(*, kwargs_handlers: list[InitProcessGroupKwargs], **_: object) -> None:
        asked.extend(handler.backend for handler in kwargs_handlers)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "Accelerator", accelerator)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(AttributeError):  # the stand-in has no rank
        _start(quant=QuantConfig(offload_meta=True), train=TrainConfig(precision="fp32"))
    assert asked == [local_rank and "cuda:nccl,cpu:gloo"]


def test_on_a_cpu_meta_is_not_offloaded(caplog: pytest.LogCaptureFixture):
    assert not _start(quant=QuantConfig(offload_meta=True)).strategy.offloads_meta
    assert "quant.offload_meta=true: has no effect on a CPU" in caplog.text
    caplog.clear()
    _start(quant=QuantConfig(nbits=None, offload_meta=True))
    assert "offload_meta" not in caplog.text, "a setting without effect is reported elsewhere"


def test_fp16_needs_a_gpu():
    with pytest.raises(UserError, match=r"train\.precision=fp16: needs a GPU; use fp32 or bf16"):
        _start(train=TrainConfig(precision="fp16"))


def test_contradictions_with_the_strategy_are_reported():
    with pytest.raises(UserError, match=r"parallel\.hsdp=true: needs parallel\.strategy=fsdp2"):
        _start(parallel=ParallelConfig(hsdp=True))
