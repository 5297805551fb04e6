"""Settings that a strategy does not support are refused with key, value and fix, all at once."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.groups import OptimConfig, TrainConfig
from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.strategies import check
from hqqtrain.distributed.strategies.check import RuntimeSettings, check_supported
from hqqtrain.distributed.strategies.registry import STRATEGIES

PLAIN = RuntimeSettings(
    ParallelConfig(), QuantConfig(), AdapterConfig(), TrainConfig(), OptimConfig(), trains=True
)


def _check(strategy, settings=PLAIN, precision="bf16", device="cuda", world_size=2):
    check_supported(
        STRATEGIES[strategy], settings, precision=precision, device=device, world_size=world_size
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_defaults_suit_every_strategy(strategy, precision):
    _check(strategy, precision=precision)


@pytest.mark.parametrize(("strategy", "changed", "precision", "device", "message"), [
    ("fsdp2", OptimConfig(name="adamw_8bit"), "fp16", "cuda",
     r"^optim\.name=adamw_8bit: .*train\.precision=fp16 needs.*use bf16, or adamw\.$"),
    ("ddp", OptimConfig(name="paged_adamw"), "fp32", "cpu",
     r"^optim\.name=paged_adamw: paged optimizers need a CUDA GPU; use adamw or adamw_8bit\.$"),
    ("ddp", OptimConfig(name="paged_adamw_8bit"), "bf16", "cpu", r"^optim\.name=paged_adamw_8bit"),
    ("zero3", OptimConfig(name="adamw_8bit"), "bf16", "cuda",
     r"^optim\.name=adamw_8bit: DeepSpeed .*under parallel\.strategy=zero3 use adamw\.$"),
    ("zero3", TrainConfig(), "fp16", "cuda",
     r"^train\.precision=fp16: parallel\.strategy=zero3 .*use bf16, or fsdp2\.$"),
    ("zero3", TrainConfig(on_nonfinite="skip"), "bf16", "cuda",
     r"^train\.on_nonfinite=skip: .*under parallel\.strategy=zero3 use stop, or fsdp2\.$"),
    ("fsdp2", AdapterConfig(dtype="bf16"), "fp16", "cuda",
     r"^adapter\.dtype=bf16: .*unscale bf16.*train\.precision=bf16 or adapter\.dtype=fp32\.$"),
    ("zero3", AdapterConfig(dtype="bf16"), "bf16", "cuda",
     r"^adapter\.dtype=bf16: .*under parallel\.strategy=zero3; use fp32, or fsdp2\.$"),
    ("ddp", ParallelConfig(offload="parameters"), "bf16", "cuda",
     r"^parallel\.offload=parameters: only parallel\.strategy=fsdp2 offloads parameters in"),
    ("fsdp2", QuantConfig(offload_meta=True), "bf16", "cuda",
     r"^quant\.offload_meta=true: .*fsdp2 shards .*use single or ddp, or parallel\.offload=param"),
    ("fsdp1", QuantConfig(offload_meta=True), "bf16", "cuda",
     r"^quant\.offload_meta=true: parallel\.strategy=fsdp1 shards .*; use single or ddp\.$"),
    ("fsdp1", ParallelConfig(hsdp=True), "bf16", "cuda",
     r"^parallel\.hsdp=true: needs parallel\.strategy=fsdp2, not fsdp1\.$"),
    ("fsdp1", QuantConfig(storage_dtype="uint8"), "bf16", "cuda",
     r"^quant\.storage_dtype=uint8: parallel\.strategy=fsdp1 flattens .*use auto"),
    ("ddp", TrainConfig(global_batch_size=3), "bf16", "cuda",
     r"^train\.global_batch_size=3: must be a multiple of the 2 processes\.$"),
    ("single", TrainConfig(), "bf16", "cuda",
     r"^parallel\.strategy=single: 2 processes were started; use ddp, fsdp2 or auto\.$"),
])  # fmt: skip
def test_contradictions(monkeypatch, strategy, changed, precision, device, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # every package is there
    (group,) = (name for name, value in vars(PLAIN).items() if isinstance(changed, type(value)))
    settings = replace(PLAIN, **{group: changed})
    with pytest.raises(UserError, match=message):
        _check(strategy, settings, precision, device)


@pytest.mark.parametrize(("strategy", "optimizer", "message"), [
    ("zero3", "adamw", r"needs deepspeed, which is not installed: pip install 'hqqtrain\[deeps"),
    ("ddp", "adamw_8bit", r"^optim\.name=adamw_8bit: needs bitsandbytes, which is not installed"),
])  # fmt: skip
def test_packages_that_are_not_installed(monkeypatch, strategy, optimizer, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        _check(strategy, replace(PLAIN, optim=OptimConfig(name=optimizer)))


def test_all_contradictions_are_reported_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    settings = replace(
        PLAIN,
        adapter=AdapterConfig(dtype="bf16"),
        parallel=ParallelConfig(hsdp=True, offload="parameters"),
        train=TrainConfig(on_nonfinite="rollback", global_batch_size=5),
    )
    with pytest.raises(UserError) as error:
        _check("zero3", settings, precision="fp16")
    assert len(str(error.value).splitlines()) == 7


def test_a_task_that_does_not_train_needs_no_optimizer():
    settings = replace(
        PLAIN, trains=False, optim=OptimConfig(name="paged_adamw"),
        train=TrainConfig(global_batch_size=3),
    )  # fmt: skip
    _check("ddp", settings, device="cpu")


def test_without_training_a_single_process_offloads_parameters():
    settings = replace(PLAIN, trains=False, parallel=ParallelConfig(offload="parameters"))
    check.check_supported(
        STRATEGIES["single"], settings, precision="bf16", device="cuda", world_size=1
    )
    message = r"^parallel\.offload=parameters: only .*single or fsdp2 offloads parameters, not ddp"
    with pytest.raises(UserError, match=message):
        _check("ddp", settings)


def test_every_key_of_a_conflict_exists():
    groups = vars(PLAIN) | {"device": "cpu"}
    for conflicts in (
        check.MACHINE_CONFLICTS,
        *(s.supports.conflicts for s in STRATEGIES.values()),
    ):
        for conflict in conflicts:
            for key in conflict.keys:
                group, _, name = key.partition(".")
                assert not name or hasattr(groups[group], name), key
            conflict.reason.format_map(groups)


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_storage_dtypes(strategy):
    assert strategy.resolve_storage_dtype("bf16", torch.float32) == torch.bfloat16
    if strategy.name in ("fsdp1", "zero3"):
        assert strategy.resolve_storage_dtype("auto", torch.float32) == torch.float32
    elif strategy.name != "fsdp2":
        assert strategy.resolve_storage_dtype("auto", torch.float32) == torch.uint8
