"""A non-finite batch: its layer is named, it is saved, and `train.on_nonfinite` is followed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, free_port, run, run_in_this_process, small_data

from hqqtrain.tracking.jsonl import read_metrics
from hqqtrain.training.nonfinite import MAX_REFUSED_IN_A_ROW
from hqqtrain.training.trainer import Trainer

_WORDS = (
    *SMALL, "run.name=run", "train.max_steps=8", "eval.source=null", "ckpt.every=3",
    "parallel.consistency_check_every=null", "quant.solver=rtn",
)  # fmt: skip
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    return (*_WORDS, *small_data(tmp_path), f"run.root={tmp_path}")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return a set of global batches in which one element of the output of LAYER is NaN."""
    places: set[int] = set()
    step = Trainer.step

    def poisoned(self: Trainer) -> Any:
        def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            spoilt = torch.zeros_like(output)
            spoilt.view(-1)[7] = torch.nan
            return output + spoilt

        module = next(m for n, m in self.engine.model.named_modules() if n.endswith(LAYER))
        handle = (
            module.register_forward_hook(hook) if self.state.next_batch_index in places else None
        )
        try:
            return step(self)
        finally:
            if handle:
                handle.remove()

    monkeypatch.setattr(Trainer, "step", poisoned)
    return places


def state(root: Path) -> dict[str, Any]:
    newest = max((root / "run" / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_text())["trained"]


def losses(root: Path) -> list[float]:
    rows = read_metrics(root / "run" / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_stop_names_the_layer_and_saves_the_batch(
    tmp_path: Path, words: tuple, poison: set[int], capsys
):
    poison.add(4)
    assert run_in_this_process([*words]) == 2
    errors = capsys.readouterr().err
    assert (
        f"global batch 4 gives loss nan, gradient norm nan; first in the output of {LAYER}"
        in errors
    )
    (file,) = (tmp_path / "run" / "nonfinite").iterdir()
    facts = json.loads(file.read_text())
    assert (facts["batch"], facts["step"], facts["layer"]) == (4, 5, LAYER)
    assert len(facts["samples"]) == len(facts["tokens"]) == 4
    assert {len(row) for row in facts["tokens"]} == {64}
    assert state(tmp_path)["steps"] == 3  # the checkpoint to resume from is finite
    poison.clear()
    assert run_in_this_process([*words]) == 0
    assert len(losses(tmp_path)) == 8


def test_skip_leaves_the_batch_out(tmp_path: Path, words: tuple, poison: set[int]):
    poison |= {2, 5}
    assert run_in_this_process([*words, "train.on_nonfinite=skip"]) == 0
    assert len(losses(tmp_path)) == 8
    assert (state(tmp_path)["steps"], state(tmp_path)["skipped"]) == (8, 2)
    assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == 2


def test_rollback_skips_the_steps_since_the_checkpoint(
    tmp_path: Path, words: tuple, poison: set[int]
):
    poison.add(5)
    assert run_in_this_process([*words, "train.on_nonfinite=rollback"]) == 0
    assert (state(tmp_path)["steps"], state(tmp_path)["skipped"]) == (8, 3)  # batches 3, 4 and 5
    skipped = tmp_path / "skipped"
    poison |= {3, 4}
    assert run_in_this_process([*words, "train.on_nonfinite=skip", f"run.root={skipped}"]) == 0
    assert losses(skipped) == losses(tmp_path)


def test_a_batch_is_saved_with_the_number_of_its_step(
    tmp_path: Path, words: tuple, poison: set[int]
):
    poison |= {
        4,
        5,
    }  # the first is one step after the checkpoint of step 3, the second directly after it
    assert run_in_this_process([*words, "train.on_nonfinite=rollback"]) == 0
    kept = sorted((tmp_path / "run" / "nonfinite").iterdir())
    facts = [json.loads(file.read_text()) for file in kept]
    assert [(f["batch"], f["step"]) for f in facts] == [(4, 5), (5, 4)]


def test_too_many_in_a_row_stop_the_run(words: tuple, poison: set[int], capsys):
    poison |= set(range(2, 2 + MAX_REFUSED_IN_A_ROW))
    assert run_in_this_process([*words, "train.on_nonfinite=skip"]) == 2
    assert f"{MAX_REFUSED_IN_A_ROW} times" in capsys.readouterr().err


def test_repeated_rollbacks_stop_the_run(words: tuple, poison: set[int], capsys):
    """Each rollback is followed by one good step, so the batches are not in a row."""
    poison |= set(range(4, 60, 2))
    assert run_in_this_process([*words, "train.on_nonfinite=rollback"]) == 2
    assert f"{MAX_REFUSED_IN_A_ROW} times" in capsys.readouterr().err


def test_rollback_with_an_8_bit_optimizer(tmp_path: Path, words: tuple, poison: set[int]):
    pytest.importorskip("bitsandbytes")
    eight = (*words, "train.on_nonfinite=rollback", "optim.name=adamw_8bit")
    poison |= {1, 5}
    assert run_in_this_process([*eight, "train.max_steps=6"]) == 0
    assert run_in_this_process([*eight, "train.max_steps=8"]) == 0
    assert len(losses(tmp_path)) == 8


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_a_gradient_alone_is_traced_to_a_parameter(
    words: tuple, monkeypatch, capsys, factor: float
):
    step = Trainer.step

    def poisoned(self: Trainer) -> Any:
        is_poisoned = self.state.next_batch_index == 1
        named = self.trainable_parameters.items()
        param = next(p for n, p in named if "layers.1.self_attn.v_proj.lora_B" in n)
        hook = param.register_hook(lambda g: g * factor) if is_poisoned else None
        try:
            return step(self)
        finally:
            if hook:
                hook.remove()

    monkeypatch.setattr(Trainer, "step", poisoned)
    assert run_in_this_process([*words]) == 2
    errors = capsys.readouterr().err
    assert (
        "first in the gradient of base_model.model.model.layers.1.self_attn.v_proj.lora_B" in errors
    )


def _spoil_gradients_in_a_process_group() -> None:
    """Make a gradient of a LoRA layer NaN in every step, and let the only rank form a group."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    step = Trainer.step

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        if output.requires_grad:
            output.register_hook(lambda g: g * torch.nan)
        return output

    def poisoned(self: Trainer) -> Any:
        name = "layers.1.self_attn.v_proj.lora_B.default"
        module = next(m for n, m in self.engine.model.named_modules() if n.endswith(name))
        module.register_forward_hook(hook)
        return step(self)

    Trainer.step = poisoned  # type: ignore[method-assign]


def test_a_gradient_inside_deepspeed_is_traced_to_a_parameter(tmp_path: Path):
    pytest.importorskip("deepspeed")
    words = (*_WORDS, *small_data(tmp_path), "parallel.strategy=zero3")
    done = run(*words, root=tmp_path / "runs", before=_spoil_gradients_in_a_process_group)
    assert done.code == 2, done.output
    assert "gradient of base_model.model.model.layers.1.self_attn.v_proj.lora_B" in done.output
