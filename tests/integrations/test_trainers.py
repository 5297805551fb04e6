"""transformers' Trainer and TRL's SFTTrainer train adapters on a model that hqqtrain quantized."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hqqtrain
from hqqtrain.models.source import TINY_FOLDER

TOKENS = torch.arange(16).view(2, 8)
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05,
         "report_to": [], "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}  # fmt: skip


@pytest.fixture
def base(make_trained, tmp_path: Path) -> Path:
    return make_trained(nbits=2).save(tmp_path / "quantized")


def check_trained(trainer: Trainer, base: Path, folder: Path) -> None:
    """Train, save and reload."""
    packed = {n: p.clone() for n, p in trainer.model.named_parameters() if n.endswith("W_q")}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], W_q) for name, W_q in packed.items())
    trainer.save_model(str(folder))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        expected = trainer.model.eval()(TOKENS).logits
        assert torch.equal(again(TOKENS).logits, expected)


def test_trainer(base: Path, tmp_path: Path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(str(tmp_path / "out"), save_strategy="no", **STEPS)
    check_trained(Trainer(model, arguments, train_dataset=data), base, tmp_path / "adapter")


def test_trainer_with_packed_data(base: Path, tmp_path: Path):
    """Its loss is that of our own evaluation, which keeps the packed texts apart."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    rows = [list(range(first, first + 6)) for first in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    data = hqqtrain.load_data(
        tmp_path / "rows.jsonl", AutoTokenizer.from_pretrained(TINY_FOLDER), max_seq_len=20
    )
    assert len(data) < len(rows)
    expected = hqqtrain.evaluate(model, data).loss
    arguments = TrainingArguments(str(tmp_path / "out"), save_strategy="no", **STEPS)
    trainer = Trainer(
        model, arguments, train_dataset=data, data_collator=hqqtrain.collate_batch,
        eval_dataset=data,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.01)
    trainer.train()
    assert hqqtrain.evaluate(model, data).loss < expected


def test_sft_trainer(base: Path, tmp_path: Path):
    data = Dataset.from_dict({"input_ids": [list(range(8)), list(range(8, 16))]})
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        SFTConfig(str(tmp_path / "out"), save_strategy="no", bf16=False, **STEPS),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(TINY_FOLDER),
        peft_config=LORA,
    )
    check_trained(trainer, base, tmp_path / "adapter")
