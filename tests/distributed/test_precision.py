"""`train.precision=auto` on CPUs with and without instructions for bf16."""

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.precision import (
    multiplies_bf16,
    resolve_precision,
    resolve_training_precision,
)


@pytest.fixture
def use_cpu(monkeypatch):
    def use(*instructions: str, isa: str = "") -> None:
        found = dict.fromkeys(("avx2", *instructions), True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)

    return use


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16"])
def test_only_training_multiplies_in_bf16_on_a_cpu_that_can(use_cpu, instruction):
    use_cpu(instruction)
    assert (resolve_precision("auto"), resolve_training_precision("auto")) == ("fp32", "bf16")
    assert resolve_training_precision("fp32") == "fp32"
    assert resolve_precision("bf16") == resolve_training_precision("bf16") == "bf16"
    with pytest.raises(UserError, match=r"train\.precision=fp16: needs a GPU"):
        resolve_training_precision("fp16")


def test_other_cpus_multiply_in_fp32(use_cpu):
    use_cpu()
    assert resolve_training_precision("auto") == "fp32"


@pytest.mark.parametrize(("isa", "expected"), [("avx512_core", False), ("ALL", True)])
def test_a_limit_of_onednn_is_respected(use_cpu, isa, expected):
    use_cpu("avx512_bf16", isa=isa)
    assert resolve_training_precision("auto") == ("bf16" if expected else "fp32")
    assert multiplies_bf16({"ONEDNN_MAX_CPU_ISA": isa}) is expected
    assert multiplies_bf16({})


def test_a_pytorch_that_does_not_tell_multiplies_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bf16({})
