"""The task `finetune` in one process: its files, its figures, and a run that resumes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hqqtrain.common.errors import PreemptedError
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.finetune import finetune


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_what_a_finetune_leaves(make_config, start_run):
    with start_run(make_config()) as run:
        finetune(run)
        folder = run.layout.folder
        trained = run.recorder.summary.content.train
        perplexities = run.recorder.perplexities()
    adapter = _adapter(folder)
    assert adapter
    assert all(name.startswith("base_model.model.model.layers.0.") for name in adapter)
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert trained.steps == 2
    assert trained.trainable_parameters == sum(tensor.numel() for tensor in adapter.values())
    assert list(perplexities) == [f"perplexity, {model}" for model in
                                  ("full precision", "quantized", "trained")]  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train"]["loss"] == _losses(folder)[-1]
    assert summary["quantize"]["fingerprint"] in (folder / "adapter" / "README.md").read_text()
    state = json.loads((folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert (state["strategy"], state["world_size"], state["step"]) == ("single", 1, 2)
    assert set(state["texts"]) == {"data.source", "eval.source"}


@pytest.fixture
def run_finetune(make_config, start_run):
    """Return a function that runs `finetune` in the run directory `name` and returns its path."""

    def run_in(name: str) -> Path:
        with start_run(make_config(run={"name": name})) as run:
            finetune(run)
        return run.layout.folder

    return run_in


def test_a_resumed_run_equals_an_uninterrupted_one(run_finetune, monkeypatch, tmp_path):
    whole, folder = run_finetune("whole"), tmp_path / "runs" / "stopped"
    with monkeypatch.context() as patch:
        # The request arrives in the first step: an evaluation before it would stop at once.
        patch.setattr(RecordedEvaluation, "evaluate_as", lambda *_, **__: None)
        patch.setattr(PreemptionHandler, "stop_reason", "SIGUSR1 was received")
        with pytest.raises(PreemptedError):
            run_finetune("stopped")
    assert len(_losses(folder)) == 1
    assert not (folder / "adapter").exists()
    run_finetune("stopped")
    assert _losses(folder) == _losses(whole)
    ours, theirs = _adapter(folder), _adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
