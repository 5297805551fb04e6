"""An existing accelerate configuration is adopted, or refused with both sides named."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import TrainConfig
from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.distributed.accelerate_env import reconcile_accelerate_config

PLAIN = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
FSDP2 = PLAIN | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}


FSDP1 = FSDP2 | {"FSDP_VERSION": "1"}
ZERO3 = PLAIN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def settled(
    environ: dict[str, str], strategy: str = "auto", precision: str = "auto", offloads: bool = False
) -> tuple[str, str]:
    return reconcile_accelerate_config(dict(environ), *configured(strategy, precision, offloads))


def configured(
    strategy: str = "auto", precision: str = "auto", offloads: bool = False
) -> tuple[ParallelConfig, TrainConfig]:
    offload = "parameters" if offloads else "none"
    return ParallelConfig(strategy=strategy, offload=offload), TrainConfig(precision=precision)


@pytest.mark.parametrize("environ", [{}, PLAIN])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_defaults_of_accelerate_change_nothing(environ, precision):
    assert settled(environ, "ddp", precision) == ("ddp", precision)


@pytest.mark.parametrize(("environ", "strategy"), [
    (FSDP2, "fsdp2"), (FSDP1, "fsdp1"), (ZERO3, "zero3"),
])  # fmt: skip
@pytest.mark.parametrize("named", [False, True])
def test_accelerate_does_not_wrap_the_model_again(environ, strategy, named):
    taken = dict(environ)
    asked = strategy if named else "auto"
    found, _ = reconcile_accelerate_config(taken, *configured(asked))
    assert found == strategy
    assert taken["ACCELERATE_USE_FSDP"] == "false", "otherwise Accelerator wraps the model again"
    assert taken["ACCELERATE_USE_DEEPSPEED"] == "false"


def test_equal_settings_are_accepted():
    agreed = {
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    }
    assert settled(ZERO3 | agreed) == ("zero3", "auto")


def test_offloading_must_be_set_on_both_sides():
    offloading = FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}
    assert settled(offloading, offloads=True) == ("fsdp2", "auto")
    with pytest.raises(UserError, match=r"parallel\.offload=parameters"):
        settled(offloading)


def test_mixed_precision_resolves_auto():
    assert settled(PLAIN | {"ACCELERATE_MIXED_PRECISION": "fp16"}) == ("auto", "fp16")
    mixed = PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert settled(mixed, precision="bf16") == ("auto", "bf16")


@pytest.mark.parametrize(("more", "strategy", "precision", "message"), [
    ({"FSDP_VERSION": "1"}, "fsdp2", "auto", r"parallel\.strategy=fsdp2: .* asks for fsdp1"),
    ({}, "ddp", "auto", r"parallel\.strategy=ddp: .* asks for fsdp2"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp2", "auto", "fsdp_offload_params: true"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "auto", "auto", "zero_stage: 2"),
    (ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "a.json"}, "auto", "auto", "deepspeed_config"),
    (ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "auto", "auto", "offload_param"),
    (ZERO3 | {"ACCELERATE_GRADIENT_CLIPPING": "0.1"}, "zero3", "auto", "gradient_clipping: 0.1"),
    ({"FSDP_VERSION": "3"}, "auto", "auto", "fsdp_version: 3"),
    (ZERO3, "fsdp2", "auto", r"parallel\.strategy=fsdp2: .* asks for zero3"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "auto", "auto", "Megatron-LM"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "auto", "auto", "dynamo_backend INDUCTOR"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "auto", "auto", "mixed_precision: fp8"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "auto", "fp32", r"train\.precision=fp32: .*bf16"),
])  # fmt: skip
def test_contradictions(more, strategy, precision, message):
    with pytest.raises(UserError, match=message):
        settled((more if more.keys() >= ZERO3.keys() else FSDP2 | more), strategy, precision)


def test_all_contradictions_are_reported_at_once():
    with pytest.raises(UserError) as fault:
        settled(FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_MIXED_PRECISION": "fp8"})
    assert len(str(fault.value).splitlines()) == 2
