"""The control, quant.nbits=null: plain LoRA on the dense base, under the same loop and reports."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.data.loader import PackedLoader
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.loading.plan import plan_model
from hqqtrain.nn.base_linears import DenseLinear, base_linears
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import init_adapters
from hqqtrain.rundir.schema import MODEL_NAMES
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.export import export
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.inference import evaluate, quantize
from hqqtrain.tasks.model import plan_settings
from hqqtrain.tasks.resources import workload_of
from hqqtrain.training.optimizer import LearningRateSchedule

CONTROL = {"nbits": None}


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in _rows(folder) if "train/loss" in row]


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def train(make_config, start_run):
    """Return a function that trains a control in the run directory `name`; it returns the run."""

    def train(name: str = "run", **groups):
        groups = {"quant": CONTROL, "run": {"name": name}} | groups
        with start_run(make_config(**groups)) as run:
            finetune(run)
        return run

    return train


def test_the_layers_that_others_quantize_stay_dense_and_get_the_same_adapters(
    make_config, start_run
):
    settings = {"overrides": {"up_proj": None}, "skip": ["lm_head", "k_proj"]}
    plans = {}
    for nbits in (4, None):
        with start_run(make_config(quant=settings | {"nbits": nbits})) as run:
            plans[nbits] = plan_model(plan_settings(run.config), run.runtime)
    quantized, control = plans[4], plans[None]
    assert control.lora.target_modules == quantized.lora.target_modules
    assert base_linears(control.model).keys() == base_linears(quantized.model).keys()
    assert all(type(layer) is DenseLinear for layer in base_linears(control.model).values())
    assert not any(isinstance(module, HQQLinear) for module in control.model.modules())
    names = [name for name, param in quantized.model.named_parameters() if param.requires_grad]
    assert [n for n, p in control.model.named_parameters() if p.requires_grad] == names


def test_what_the_control_leaves(train):
    run = train()
    folder, summary = run.layout.folder, json.loads(run.layout.summary_json.read_text())
    assert not run.layout.has_quantized
    quantize, evaluation = summary["quantize"], summary["eval"]
    assert (quantize["nbits"], quantize["bits_per_weight"]) == (None, 16)
    assert quantize["relative_error"] == 0
    assert quantize["bytes_read"] == quantize["source_bytes"]
    assert "solver" not in quantize
    assert [key for key in MODEL_NAMES if key in evaluation] == ["full_precision", "final"]
    assert evaluation["bytes_read"] == 0  # the reference is the model without its adapter
    assert evaluation["final"]["kl"] > 0
    assert [row.model for row in run.recorder.summary.table_rows()] == ["full precision", "trained"]
    assert {row.bits_per_weight for row in run.recorder.summary.table_rows()} == {16}
    first = next(row for row in _rows(folder) if "eval/perplexity" in row)
    assert first["eval/perplexity"] == evaluation["full_precision"]["perplexity"]
    card = (folder / "adapter" / "README.md").read_text()
    assert "# LoRA adapter for a base in full precision" in card
    assert quantize["fingerprint"] in card
    assert "\n- hqq\n" not in card


def test_the_training_is_that_of_a_plain_peft_loop(train, tiny_model, monkeypatch):
    """The loop below has nothing of this package but batches, initial values and schedule."""
    batches, original = {}, PackedLoader.batches

    def batches_of(loader: PackedLoader, index: int) -> Iterator[dict]:
        batches[index] = list(original(loader, index))
        return iter(batches[index])

    monkeypatch.setattr(PackedLoader, "batches", batches_of)
    run = train(train={"max_steps": 4, "max_grad_norm": 1.0}, ckpt={"every": None})
    config = run.config
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"),
    )
    init_adapters(model, config.train.seed, "default", lambda param, full: param.data.copy_(full))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=config.optim.weight_decay)
    schedule, losses = LearningRateSchedule(config.optim, 4), []
    for step in range(4):
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches[step])
        losses.append(0.0)
        for batch in batches[step]:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits, labels, reduction="sum") / tokens
            loss.backward()
            losses[step] += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(_losses(run.layout.folder), abs=1e-5)
    ours = _adapter(run.layout.folder)
    for name, value in get_peft_model_state_dict(model).items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)


def test_peft_and_an_export_have_the_logits_of_the_trained_model(
    make_config, start_run, train, tiny_model
):
    run = train(adapter={"kind": "rslora"}, optim={"lr": 0.1})
    by_adapter = {"adapter": {"init_from": str(run.layout.adapter)}, "run": {"name": "export"}}
    with start_run(make_config("export", quant=CONTROL, **by_adapter)) as exporting:
        export(exporting)
    by_run = {"model": {"name_or_path": str(run.layout.folder)}, "run": {"name": "eval"}}
    with start_run(make_config("eval", quant=CONTROL, **by_run)) as evaluating:
        evaluate(evaluating)
    measured = [r.recorder.summary.content.eval for r in (run, evaluating)]
    assert measured[0].final == measured[1].final
    assert measured[0].full_precision == measured[1].full_precision
    tokens = torch.arange(32)[None]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(exporting.layout.export, dtype=torch.float32)
    with torch.no_grad():
        untouched = model(tokens).logits
        adapted = PeftModel.from_pretrained(model, run.layout.adapter).eval()(tokens).logits
        found = AutoPeftModelForCausalLM.from_pretrained(run.layout.adapter, dtype=torch.float32)
        assert torch.equal(found.eval()(tokens).logits, adapted)
        torch.testing.assert_close(merged(tokens).logits, adapted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(adapted, untouched, atol=1e-2)


def test_the_adapter_belongs_to_the_dense_base(make_config, start_run, train):
    """The fingerprint of a base that is quantized to 8 bits is another."""
    run = train()
    again = {"adapter": {"init_from": str(run.layout.adapter)}, "run": {"name": "other"}}
    with (
        pytest.raises(UserError, match="trained on the base sha256:"),
        start_run(make_config("eval", quant={"nbits": 8}, **again)) as evaluating,
    ):
        evaluate(evaluating)


def test_a_resumed_control_equals_an_uninterrupted_one(train, monkeypatch, tmp_path):
    whole, folder = train("whole").layout.folder, tmp_path / "runs" / "stopped"
    with monkeypatch.context() as patch:
        # The request arrives in the first step: an evaluation before it would stop at once.
        patch.setattr(RecordedEvaluation, "evaluate_as", lambda *_, **__: None)
        patch.setattr(PreemptionHandler, "stop_reason", "SIGUSR1 was received")
        with pytest.raises(PreemptedError):
            train("stopped")
    train("stopped")
    assert _losses(folder) == _losses(whole)
    ours, theirs = _adapter(folder), _adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_reference_needs_no_second_model(make_config, start_run, train):
    run = train(eval={"reference": "off"}, train={"max_steps": 1})
    evaluation = run.recorder.summary.content.eval
    assert evaluation.final.kl is None
    assert evaluation.full_precision.perplexity > 1
    workload = {nbits: workload_of(make_config(quant={"nbits": nbits})) for nbits in (4, None)}
    assert [each.reference for each in workload.values()] == ["resident", "off"]
    assert not workload[None].saves_quantized


def test_weights_that_are_quantized_already_are_no_control(make_config, start_run):
    with start_run(make_config("quantize")) as run:
        quantize(run)
    model = {"name_or_path": str(run.layout.quantized)}
    with (
        pytest.raises(
            UserError, match=r"quant\.nbits=null: the weights of .* are quantized already"
        ),
        start_run(make_config("eval", quant=CONTROL, model=model, run={"name": "e"})) as evaluating,
    ):
        evaluate(evaluating)
