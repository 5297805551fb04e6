"""`train` is the loop of a run."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.tasks.finetune import finetune
from hqqtrain.training.state import StepResult


def test_a_run_and_the_functions_compute_the_same(make_config, start_run, tiny_model, tmp_path):
    with start_run(make_config(eval={"tokens": 65536})) as run:
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
        ({"fused": "yes"}, "fused=yes: allowed are auto, False"),
        ({"activation_checkpointing": "half"}, "activation_checkpointing=half: allowed are auto"),
        ({"on_nonfinite": "rollback"}, "on_nonfinite=rollback: needs the checkpoints of a run"),
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


def state_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes of every module, and how many hooks it has."""
    return {
        name: {k: len(v) if k.endswith("_hooks") else v for k, v in vars(module).items()}
        for name, module in model.named_modules()
    }


def fused_modules(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("error", [False, True])
def test_the_model_comes_back_as_it_was(quantized, tokenizer, text_file: Path, error: bool):
    model = hqqtrain.add_lora(quantized, r=2)
    model.eval()
    model.get_submodule("base_model.model.model.layers.0.mlp").train()
    quantized.enable_input_require_grads()
    data, before, numbers = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64), {}, []
    before = state_of(model)

    def look(step: StepResult) -> None:
        numbers.append(fused_modules(model))
        assert all(layer.gradient_checkpointing for layer in quantized.model.layers)
        if error:
            raise KeyboardInterrupt

    settings = {"batch_size": 1, "activation_checkpointing": "full", "on_step": look}
    try:
        hqqtrain.train(model, data, max_steps=2, **settings)
    except KeyboardInterrupt:
        assert error
    blocks = 3 * len(quantized.model.layers)  # q|k|v have a forward each, and o and the MLP
    assert numbers == [blocks + 2 * len(quantized.model.layers)] * (1 if error else 2)
    hooks = {"_require_grads_hook", "_require_grads_hooks"}  # transformers has made new ones
    for name, attributes in state_of(model).items():
        assert attributes.keys() == before[name].keys(), name
        for key in attributes.keys() - hooks:
            assert attributes[key] is before[name][key] or attributes[key] == before[name][key], key
    assert quantized.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fused_kernels_round_and_nothing_else(quantized, tokenizer, text_file: Path):
    model = hqqtrain.add_lora(quantized, r=2)
    plain, numbers = copy.deepcopy(model), []
    data = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64)
    settings = {"max_steps": 3, "batch_size": 2, "lr": 1e-2}
    expected = hqqtrain.train(
        plain, data, **settings, fused=False,
        on_step=lambda _: numbers.append(fused_modules(plain)),
    )  # fmt: skip
    assert numbers == [0, 0, 0]
    found = hqqtrain.train(model, data, **settings, activation_checkpointing=1)
    assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], abs=1e-5)


def test_a_trained_model_is_used_as_before(quantized, tokenizer, text_file: Path, tmp_path: Path):
    model = hqqtrain.add_lora(quantized, r=2)
    data = hqqtrain.load_data(text_file, tokenizer, max_seq_len=64)
    hqqtrain.train(model, data, max_steps=2, batch_size=1, lr=1e-2)
    tokens = torch.arange(1, 17)[None]
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        torch.testing.assert_close(compiled(tokens).logits, expected)
        model.save_pretrained(tmp_path)
        written = model.generate(tokens, max_new_tokens=3, do_sample=False)
        again = PeftModel.from_pretrained(model.unload(), tmp_path)
        assert torch.equal(again(tokens).logits, expected)
        assert torch.equal(again.generate(tokens, max_new_tokens=3, do_sample=False), written)
