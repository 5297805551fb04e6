"""Calibrated loading: the bits of one process on several ranks, and a plain reference."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import CPU, on_ranks
from torch import Tensor, nn
from transformers import LlamaConfig

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.distributed.strategies.row_sharding import shard_rows
from hqqtrain.formats.fingerprint import Fingerprint
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.load import load_model
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.weights.synthetic import SyntheticReader
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.replace import quantize_model
from hqqtrain.quant.calibrated.quantize import quantize_rows
from hqqtrain.quant.calibrated.statistics import InputStatistics, plan_columns
from hqqtrain.quant.quantize import dequantize_weight

CASES = [
    {"nbits": 4, "group_size": 16}, {"nbits": 2, "group_size": 32, "axis": 0},
    {"nbits": 3, "group_size": None, "zero": "integer"},
    {"nbits": 1, "group_size": 8, "solver": "least_squares"},
    {"nbits": 4, "group_size": 16, "skip": [], "overrides": {
        "o_proj": {"solver": "hqq"}, "*.0.mlp.*": {"nbits": 8}, "v_proj": None}},
]  # fmt: skip
CONFIG = LlamaConfig(
    vocab_size=100, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=1, attention_bias=True,
    tie_word_embeddings=False, dtype="float32", max_position_embeddings=64,
)  # fmt: skip


def text() -> Tensor:
    return torch.randint(3, 90, (9, 13), generator=torch.Generator().manual_seed(1))


def calibration() -> Calibration:
    return Calibration(text(), build_meta(CONFIG, torch.float32), "sha256:0")


def make_model(case: dict) -> nn.Module:
    model = build_meta(CONFIG, torch.float32)
    quantize_model(model, QuantConfig(**{"solver": "gptq", "calibration": "auto"} | case))
    return model


def reader_of(model: nn.Module) -> SyntheticReader:
    return SyntheticReader(expected_shapes(model, packed=False), torch.bfloat16, CPU)


def load(case: dict, comm: Communicator, strategy: str, **options) -> tuple[str, int, int, list]:
    """Return fingerprint, bytes that this rank has read, bytes of the source, and errors."""
    model = make_model(case)
    reader = reader_of(model)
    if strategy == "spread":
        shard_rows(model, comm)
    elif strategy != "ddp" and comm.size > 1:
        FSDP2(comm, replicas=2 if strategy == "hybrid" else 1).shard(model)
    found = Fingerprint()
    result = load_model(
        model, reader, comm, calibration=calibration(), on_rows=found.update, **options
    )
    total = Fingerprint()
    for part in comm.all_gather_object(found.total):
        total.merge(part)
    fingerprint = total.hexdigest(QuantizedSettings.from_model(model).by_module())
    _, error = result.relative_errors(comm)
    return fingerprint, reader.bytes_read, reader.total_bytes, [error]


def load_all(rank: int, comm: Communicator, folder: Path, strategy: str, cases: list) -> None:
    answers = [load(case, comm, strategy) for case in cases]
    (folder / f"{rank}.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def alone() -> list[tuple]:
    return [load(case, SINGLE_PROCESS, "single") for case in CASES]


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "strategy", "cases"), [
    (3, "fsdp2", range(5)), (2, "fsdp2", (4,)), (2, "ddp", (0, 4)), (3, "spread", (1, 2)),
    (4, "hybrid", (4,)),
])  # fmt: skip
def test_fingerprint_does_not_depend_on_ranks(
    size: int, strategy: str, cases: tuple, alone: list, tmp_path: Path
) -> None:
    chosen = [CASES[number] for number in cases]
    assert on_ranks(load_all, size, tmp_path, strategy, chosen) == [""] * size
    by_rank = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    for position, number in enumerate(cases):
        answers, (fingerprint, _, total_bytes, errors) = (
            [f[position] for f in by_rank],
            alone[number],
        )
        assert {answer[0] for answer in answers} == {fingerprint}
        assert sum(answer[1] for answer in answers) == total_bytes  # each byte once
        assert answers[0][3] == pytest.approx(errors)


def test_it_is_the_plain_way_layer_by_layer() -> None:
    """Quantize a dense model in place, linear after linear, with hooks in the whole model."""
    model = make_model({"nbits": 3, "group_size": 16})
    load_model(model, reader_of(model), SINGLE_PROCESS, calibration=calibration())
    specs = {name: m.spec for name, m in model.named_modules() if isinstance(m, HQQLinear)}
    full, ours = (build_meta(CONFIG, torch.float32) for _ in range(2))
    for dense in (full, ours):
        load_model(dense, reader_of(dense), SINGLE_PROCESS)
    for index in (0, 1):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                      ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
                      ("mlp.down_proj",)):  # fmt: skip
            group = [f"model.layers.{index}.{name}" for name in names]
            f, x = (_input(dense, group[0]) for dense in (full, ours))
            statistics = InputStatistics(x.t() @ x / len(x), f.t() @ x / len(x))
            plan = plan_columns(statistics, 16, 1, has_feedback=True)
            for name in group:
                linear, spec = ours.get_submodule(name), specs[name]
                layout = spec.layout(*linear.weight.shape)
                packed = quantize_rows(linear.weight.data, layout, 0, spec, plan)
                linear.weight.data = dequantize_weight(packed, layout, torch.float32)
    for name in specs:
        expected = ours.get_submodule(name).weight
        found = model.get_submodule(name).dequantize()
        # Sums in another order move a few weights to the next code.
        assert ((found - expected).abs() < 1e-5).float().mean() > 0.98, name


def _input(model: nn.Module, name: str) -> Tensor:
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0])
    )
    with hook, torch.no_grad():
        model(text())
    return found[0].flatten(0, -2)


def test_linears_outside_of_the_decoder_layers_are_quantized_alone(alone: list) -> None:
    model = make_model(CASES[4])
    load_model(model, reader_of(model), SINGLE_PROCESS, calibration=calibration())
    without = make_model(CASES[4])
    load_model(without, reader_of(without), SINGLE_PROCESS)
    assert torch.equal(model.lm_head.W_q, without.lm_head.W_q)
    assert not torch.equal(
        model.model.layers[0].mlp.up_proj.W_q, without.model.layers[0].mlp.up_proj.W_q
    )
    # A solver that does not calibrate gives its own result, between calibrated linears.
    hqq = [m.model.layers[0].self_attn.o_proj for m in (model, without)]
    assert torch.equal(hqq[0].W_q, hqq[1].W_q)


class Broken(SyntheticReader):
    """A source with one NaN, in the last row of a linear of the second layer."""

    def read(self, name: str, rows=None) -> Tensor:
        tensor = super().read(name, rows)
        if name == "model.layers.1.mlp.up_proj.weight" and (not rows or rows[-1].stop == 160):
            tensor[-1, 0] = torch.nan
        return tensor


def load_broken(rank: int, comm: Communicator) -> None:
    model = make_model(CASES[0])
    FSDP2(comm).shard(model)
    reader = Broken(expected_shapes(model, packed=False), torch.bfloat16, CPU)
    load_model(model, reader, comm, calibration=calibration())


@pytest.mark.ranks
def test_a_weight_that_is_not_finite_is_named_on_every_rank() -> None:
    errors = on_ranks(load_broken, 2)
    assert errors[0] == errors[1]
    assert errors[0].startswith("model.layers.1.mlp.up_proj.weight: row 159 holds nan")


def test_weights_near_the_largest_float_are_refused() -> None:
    class Huge(SyntheticReader):
        def read(self, name: str, rows=None) -> Tensor:
            tensor = super().read(name, rows)
            if name == "model.layers.0.mlp.down_proj.weight":
                tensor.copy_(tensor.double() / tensor.abs().max() * 3.3e38)
            return tensor

    model = make_model({"nbits": 1, "group_size": None})
    reader = Huge(expected_shapes(model, packed=False), torch.bfloat16, CPU)
    # All inputs are nearly equal, so every error changes the later columns by as much.
    text_of_one_token = replace(calibration(), sequences=torch.full((9, 13), 5))
    with pytest.raises(UserError, match=r"^model\.layers\.0\.mlp\.down_proj\.weight: is so large"):
        load_model(model, reader, SINGLE_PROCESS, calibration=text_of_one_token)


def stop_one(rank: int, comm: Communicator) -> None:
    def on_layer(name: str) -> None:
        if rank == 1 and name == "model.layers.1.self_attn.q_proj":
            raise PreemptedError("SIGTERM")

    load(CASES[0], comm, "fsdp2", on_layer=on_layer)


@pytest.mark.ranks
def test_a_signal_to_one_rank_stops_all() -> None:
    assert on_ranks(stop_one, 2) == ["PreemptedError: SIGTERM"] * 2


def lose_one(rank: int, comm: Communicator) -> None:
    def on_layer(name: str) -> None:
        if rank == 1 and name == "model.layers.1.self_attn.q_proj":
            os.kill(os.getpid(), signal.SIGKILL)

    load(CASES[0], comm, "fsdp2", on_layer=on_layer)


@pytest.mark.ranks
def test_a_rank_that_is_killed_is_an_error_of_the_other() -> None:
    (error,) = on_ranks(lose_one, 2, lost=1)
    assert "Connection" in error or "connection" in error
