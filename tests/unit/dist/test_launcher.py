"""An accelerate config that a user has already: taken over, or refused with both sides named."""

import pytest

from hqqtrain.config import UserError
from hqqtrain.dist.launcher import settle

PLAIN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
FSDP2 = PLAIN | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}


def settled(environ: dict[str, str], strategy: str = "auto", precision: str = "auto") -> str:
    return settle(dict(environ), strategy=strategy, precision=precision)


@pytest.mark.parametrize("environ", [{}, PLAIN])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_what_accelerate_says_by_default_says_nothing(environ, precision):
    assert settled(environ, "ddp", precision) == precision


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_fsdp2_is_ours_alone(strategy):
    environ = dict(FSDP2)
    settle(environ, strategy=strategy, precision="auto")
    assert environ["ACCELERATE_USE_FSDP"] == "false", "or Accelerator would wrap the model again"


def test_mixed_precision_is_what_auto_means():
    assert settled(PLAIN | {"ACCELERATE_MIXED_PRECISION": "fp16"}) == "fp16"
    assert settled(PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, precision="bf16") == "bf16"


@pytest.mark.parametrize(("more", "strategy", "precision", "said"), [
    ({"FSDP_VERSION": "1"}, "auto", "auto", "fsdp_version: 1; packed weights need 2"),
    ({}, "ddp", "auto", r"parallel\.strategy=ddp: .* asks for FSDP"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp2", "auto", "fsdp_offload_params: true"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "auto", "auto", "DeepSpeed"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "auto", "auto", "Megatron-LM"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "auto", "auto", "dynamo_backend INDUCTOR"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "auto", "auto", "mixed_precision: fp8"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "auto", "fp32", r"train\.precision=fp32: .*bf16"),
])  # fmt: skip
def test_contradictions(more, strategy, precision, said):
    with pytest.raises(UserError, match=said):
        settled(FSDP2 | more, strategy, precision)


def test_all_are_told_at_once():
    with pytest.raises(UserError) as fault:
        settled(FSDP2 | {"FSDP_VERSION": "1", "ACCELERATE_MIXED_PRECISION": "fp8"})
    assert len(str(fault.value).splitlines()) == 2
