"""What a run leaves can be taken elsewhere: dense weights, and a stock adapter on top of them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import QUICK, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import evaluation_set
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.perplexity import evaluate_perplexity

# A rate at which four steps leave traces that a comparison cannot miss.
TRAINED = (*QUICK, "optim.lr=0.01", "optim.warmup_steps=0", "train.precision=fp32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, its export with the adapter merged in, and the export of its base alone."""
    root = tmp_path_factory.mktemp("export")
    trained = run(*TRAINED, root=root / "trained" / "runs")
    assert trained.code == 0, trained.output
    found = {"run": trained.directory}
    for name, model in {"merged": found["run"], "base": found["run"] / "quantized"}.items():
        words = ("task=export", f"model.name_or_path={model}", "train.precision=fp32")
        done = run(*QUICK, *words, root=root / name / "runs")
        assert done.code == 0, done.output
        found[name] = done.directory / "export"
    return found


def _logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("def main(argv):\n    return", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(tokens["input_ids"]).logits


def test_stock_peft_on_the_exported_base_is_the_merged_export(folders: dict[str, Path]):
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
    plain = _logits(base, folders["base"])
    stock = PeftModel.from_pretrained(base, folders["run"] / "adapter")
    expected = _logits(merged, folders["merged"])
    torch.testing.assert_close(_logits(stock, folders["base"]), expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.1


def test_the_merged_export_measures_as_the_trained_model_did(folders: dict[str, Path]):
    """The run measured packed weights and live adapters; this is a dense model of anyone's."""
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
    tokenizer = AutoTokenizer.from_pretrained(folders["merged"])
    held_out = evaluation_set(EvalConfig(tokens=1024), DataConfig(), tokenizer, 64)
    alone = Communicator(0, 1, torch.device("cpu"))
    measured = evaluate_perplexity(merged, held_out, alone, batch_size=8)
    summary = json.loads((folders["run"] / "summary.json").read_text())
    assert measured.perplexity == pytest.approx(summary["eval"]["final"]["perplexity"], rel=1e-4)


def test_the_export_is_the_bundled_model_but_for_the_error(folders: dict[str, Path]):
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert getattr(merged.config, "quantization_config", None) is None
    assert merged.dtype == torch.float32
