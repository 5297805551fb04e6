"""Exports work without hqqtrain: dense weights, and the adapter on top of them in stock PEFT."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import EVAL_TOKENS, HELD_OUT, SMALL, TEXT, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.perplexity import evaluate_perplexity

# With this learning rate, four steps change the model enough for a comparison.
TRAINED = (*SMALL, "optim.lr=0.01", "optim.warmup_steps=0", "train.precision=fp32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a run, its export with the adapter merged in, and the export of its base alone."""
    root = tmp_path_factory.mktemp("export")
    trained = run(*TRAINED, root=root / "trained" / "runs")
    assert trained.code == 0, trained.output
    found = {"run": trained.directory}
    for name, model in {"merged": found["run"], "base": found["run"] / "quantized"}.items():
        words = ("task=export", f"model.name_or_path={model}", "train.precision=fp32")
        done = run(*SMALL, *words, root=root / name / "runs")
        assert done.code == 0, done.output
        found[name] = done.directory / "export"
    return found


def _logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("def main(argv):\n    return", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(tokens["input_ids"]).logits


def test_stock_peft_on_the_exported_base_equals_the_merged_export(folders: dict[str, Path]):
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
    plain = _logits(base, folders["base"])
    stock = PeftModel.from_pretrained(base, folders["run"] / "adapter")
    expected = _logits(merged, folders["merged"])
    torch.testing.assert_close(_logits(stock, folders["base"]), expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.1


def test_the_merged_export_has_the_perplexity_of_the_trained_model(folders: dict[str, Path]):
    """The run evaluated packed weights with separate adapters; this is a plain dense model."""
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
    tokenizer = AutoTokenizer.from_pretrained(folders["merged"])
    config = EvalConfig(source=HELD_OUT, tokens=EVAL_TOKENS)
    held_out = load_eval_set(config, DataConfig(source=TEXT), tokenizer, 64)
    alone = Communicator(0, 1, torch.device("cpu"))
    measured = evaluate_perplexity(merged, held_out, alone, batch_size=8)
    summary = json.loads((folders["run"] / "summary.json").read_text())
    assert measured.perplexity == pytest.approx(summary["eval"]["final"]["perplexity"], rel=1e-4)


def test_the_export_keeps_dtype_and_tied_embeddings(folders: dict[str, Path]):
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert getattr(merged.config, "quantization_config", None) is None
    assert merged.dtype == torch.float32


def test_the_packed_export_is_the_quantized_base(folders: dict[str, Path], tmp_path: Path):
    words = ("task=export", "export.format=packed", "train.precision=fp32")
    base = folders["run"] / "quantized"
    done = run(*SMALL, *words, f"model.name_or_path={base}", root=tmp_path / "runs")
    assert done.code == 0, done.output
    written = load_file(done.directory / "export" / "model.safetensors")
    truth = load_file(base / "model.safetensors")
    assert written.keys() == truth.keys()
    for name, tensor in truth.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_weights_of_a_finished_export_are_written_again_or_refused(folders: dict[str, Path]):
    weights = folders["merged"] / "model.safetensors"
    content, root = weights.read_bytes(), folders["merged"].parents[1]
    words = ("task=export", f"model.name_or_path={folders['run']}", "train.precision=fp32")
    weights.write_bytes(content[:-1000])
    assert run(*SMALL, *words, root=root).code == 0
    assert weights.read_bytes() == content
    assert "is done already" in run(*SMALL, *words, root=root).output
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    edited = run(*SMALL, *words, root=root)
    weights.write_bytes(content)
    assert edited.code == 2
    assert f"{weights}: is not what the run has written" in edited.output
