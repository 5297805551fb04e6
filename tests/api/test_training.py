"""`train` is the loop of a run."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.tasks.finetune import finetune


def test_a_run_and_the_functions_compute_the_same(make_config, start_run, tiny_model, tmp_path):
    # The functions have no fused kernels, which round differently.
    with start_run(make_config(eval={"tokens": 65536}, train={"fused": "false"})) as run:
        finetune(run)
    folder = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())["eval"]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = copy.deepcopy(reference)
    hqqtrain.quantize_model(model, nbits=4, group_size=16, solver="rtn")
    model = hqqtrain.add_lora(model, r=2, alpha=4)
    data = hqqtrain.load_data(tmp_path / "train.txt", tokenizer, max_seq_len=32)
    steps = hqqtrain.train(model, data, max_steps=2, batch_size=2, lr=0.01)
    assert [step.loss for step in steps] == [x["train/loss"] for x in lines if "train/loss" in x]
    held_out = (tmp_path / "held_out.txt").read_text()
    result = hqqtrain.evaluate(model, held_out, tokenizer, reference=reference, max_seq_len=32)
    assert result.perplexity == pytest.approx(summary["final"]["perplexity"])
    assert result.kl == pytest.approx(summary["final"]["kl"])

    of_run = hqqtrain.load_quantized(folder, dtype=torch.float32)
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        assert torch.equal(of_run(tokens).logits, model.eval()(tokens).logits)
    assert not isinstance(hqqtrain.load_quantized(folder, adapter=False), PeftModel)


def test_packed_texts(quantized, tokenizer, tmp_path: Path):
    """Each text has the loss that it has by itself."""
    (tmp_path / "a.jsonl").write_text('{"text": "def f(x): pass"}\n' * 4)
    model, losses = hqqtrain.add_lora(quantized, r=2), []
    for packing in (True, False):
        data = hqqtrain.load_data(tmp_path / "a.jsonl", tokenizer, packing=packing)
        losses += hqqtrain.train(model, data, max_steps=1, batch_size=len(data), lr=0.0)
    assert losses[0].loss == pytest.approx(losses[1].loss, rel=1e-5)
    assert losses[0].tokens > losses[1].tokens / 2


def test_only_the_adapter_is_trained(quantized, tokenizer, text_file: Path):
    model = hqqtrain.add_lora(quantized, r=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    data, seen = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64), []
    model.eval()
    results = hqqtrain.train(model, data, epochs=1, batch_size=8, lr=1e-2, on_step=seen.append)
    assert results == seen
    assert len(results) == -(-len(data) // 8)
    assert not model.training
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}


def test_bf16(quantized, tokenizer, text_file: Path):
    model = hqqtrain.add_lora(quantized.bfloat16(), r=2)
    data = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64)
    (step,) = hqqtrain.train(model, data, max_steps=1, batch_size=1)
    assert step.loss > 0


def test_what_is_refused(quantized, tokenizer, text_file: Path, monkeypatch):
    data = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64)
    quantized.requires_grad_(False)
    with pytest.raises(UserError, match=r"^train: model has nothing to train; call add_lora"):
        hqqtrain.train(quantized, data)
    model = hqqtrain.add_lora(quantized, r=2)
    for arguments, message in (
        ({"lr": -1.0}, "lr=-1.0: must be at least 0"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"optimizer": "sgd"}, "optimizer=sgd: allowed are adamw"),
        ({"lr": float("nan")}, "lr=nan: must be finite"),
    ):
        with pytest.raises(UserError, match=f"^train: {message}"):
            hqqtrain.train(model, data, **arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process trains"):
        hqqtrain.train(model, data)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match=r"cast it with model\.to"):
        hqqtrain.train(model.half(), data)


def test_a_loss_that_is_not_finite(quantized, tokenizer, text_file: Path):
    model = hqqtrain.add_lora(quantized, r=2)
    with torch.no_grad():
        quantized.model.norm.weight.fill_(float("nan"))
    data = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64)
    with pytest.raises(UserError, match=r"first in the output of .*norm.* Its sequences are those"):
        hqqtrain.train(model, data, max_steps=1)
