"""Statistics of the inputs of linears, compared with those of hooks in the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import random_family
from ranks import on_ranks
from torch import Tensor, nn
from transformers import PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.loading.layer_inputs import LayerInputs
from hqqtrain.models.layerwise import LayerwiseModel

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def text(sequences: int = 11) -> Tensor:
    return torch.randint(3, 90, (sequences, 13), generator=torch.Generator().manual_seed(1))


def linears_of(model: PreTrainedModel, index: int) -> dict[str, nn.Module]:
    layer = model.model.layers[index]
    return {f"model.layers.{index}.{name}": layer.get_submodule(name) for name in LINEARS}


def input_of(model: PreTrainedModel, name: str, tokens: Tensor) -> Tensor:
    """Return the input of a linear in the whole model, fp64 [tokens, in_features]."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    with hook, torch.no_grad():
        model(tokens)
    return found[0].flatten(0, -2).double()


def damage(model: PreTrainedModel, name: str) -> None:
    """Change a weight, as quantization does."""
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter((linear.weight * 4).round() / 4)


def test_statistics_are_those_of_both_models() -> None:
    full, quantized, running = (random_family("llama") for _ in range(3))
    inputs = LayerInputs(LayerwiseModel(running), text(), SINGLE_PROCESS)
    used = text()
    groups = inputs.run_full(0, linears_of(running, 0))
    assert [[name.rpartition(".")[2] for name in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip
    for index in (0, 1):
        groups = inputs.run_full(index, linears_of(running, index)) if index else groups
        for group in groups:
            linear = running.get_submodule(group[0])
            found = inputs.statistics(index, group, linear, with_cross=True)
            x, f = (input_of(model, group[0], used) for model in (quantized, full))
            assert torch.allclose(found.gram.double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
            assert torch.allclose(found.cross.double(), f.t() @ x / len(x), rtol=1e-4, atol=1e-5)
            for name in group:
                damage(running, name)
                damage(quantized, name)
        inputs.run_quantized(index)


def test_without_the_full_precision_model() -> None:
    model = random_family("llama")
    inputs = LayerInputs(LayerwiseModel(model), text(), SINGLE_PROCESS)
    inputs.run_full(0, linears_of(model, 0))
    name, linear = next(iter(linears_of(model, 0).items()))
    assert inputs.statistics(0, [name], linear, with_cross=False).cross is None


def test_a_linear_that_the_text_does_not_reach_is_in_no_group() -> None:
    model = random_family("llama")
    inputs = LayerInputs(LayerwiseModel(model), text(), SINGLE_PROCESS)
    unused = {"model.layers.1.mlp.up_proj": model.model.layers[1].mlp.up_proj}
    assert inputs.run_full(0, unused) == []


def test_inputs_that_overflow_are_an_error() -> None:
    model = random_family("llama")
    nn.init.constant_(model.model.layers[0].input_layernorm.weight, 1e30)
    inputs = LayerInputs(LayerwiseModel(model), text(), SINGLE_PROCESS)
    inputs.run_full(0, linears_of(model, 0))
    name, linear = next(iter(linears_of(model, 0).items()))
    with pytest.raises(UserError, match="q_proj: its inputs overflow on the calibration text"):
        inputs.statistics(0, [name], linear, with_cross=True)


def save_statistics(rank: int, comm: Communicator, folder: Path) -> None:
    torch.save(statistics_of(comm), folder / f"{rank}.pt")


def statistics_of(comm: Communicator) -> list[Tensor]:
    model = random_family("llama")
    inputs = LayerInputs(LayerwiseModel(model), text(), comm)
    groups = inputs.run_full(0, linears_of(model, 0))
    names = groups[-1]
    found = inputs.statistics(0, names, model.get_submodule(names[0]), with_cross=True)
    return [found.gram, found.cross]


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_same_bits(size: int, tmp_path: Path) -> None:
    assert on_ranks(save_statistics, size, tmp_path) == [""] * size
    expected = statistics_of(SINGLE_PROCESS)
    for rank in range(size):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def fail_on_one(rank: int, comm: Communicator) -> None:
    model = random_family("llama")
    inputs = LayerInputs(LayerwiseModel(model), text(), comm)
    if rank == 1:
        model.model.layers[0].mlp.forward = _raise
    inputs.run_full(0, linears_of(model, 0))


def _raise(*_: Tensor) -> Callable:
    raise MemoryError("rank 1 has no memory")


@pytest.mark.ranks
def test_an_error_of_one_rank_is_raised_on_all() -> None:
    assert on_ranks(fail_on_one, 2) == ["MemoryError: rank 1 has no memory"] * 2
