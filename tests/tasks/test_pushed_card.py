"""The cards of an adapter, a quantized model and an export, from what a run records."""

import json
from dataclasses import replace

import pytest

from hqqtrain.rundir.schema import Summary
from hqqtrain.tasks import pushed_card
from hqqtrain.tasks.pushed_card import adapter_card, export_card, quantized_card
from hqqtrain.tasks.pushed_run import PushedRun

SUMMARY = {
    "quantize": {"nbits": 2, "group_size": 64, "axis": 1, "solver": "least_squares",
                 "calibration": "/data/text.jsonl", "calibration_tokens": 16384,
                 "bits_per_weight": 2.504, "fingerprint": "sha256:1", "relative_error": 0.1029},
    "eval": {"dataset": "text", "protocol": "windows", "context": 64, "stride": 64, "tokens": 252,
             "full_precision": {"perplexity": 6.0}, "quantized": {"perplexity": 9.0, "kl": 0.5},
             "final": {"perplexity": 7.0, "kl": 0.25}},
    "train": {"steps": 4, "tokens": 1008},
}  # fmt: skip
MODEL = {"name_or_path": "meta/base", "revision": "v1", "source": "pretrained"}
RUN = PushedRun({"model": MODEL}, Summary.from_json(SUMMARY))


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr(pushed_card, "license_of", lambda *_: {"license": "mit"})


def _with_export(**export) -> PushedRun:
    return replace(RUN, summary=Summary.from_json(SUMMARY | {"export": export}))


def test_a_quantized_model():
    card = quantized_card("alice/model", RUN)
    assert (card.base, card.relation, card.library) == ("meta/base", "quantized", "transformers")
    assert card.facts == {
        "base": "[meta/base](https://huggingface.co/meta/base) at revision `v1`",
        "bits": "2, groups of 64, axis 1, solver `least_squares`, calibrated on 16,384 tokens of "
        "`.../text.jsonl`",
        "bits per weight": "2.50, scales and zeros counted",
        "relative error of the weights": "0.1029",
        "fingerprint": "`sha256:1`",
    }
    assert card.figures == {"perplexity, full precision": "6", "perplexity, quantized": "9",
                            "KL, quantized": "0.5"}  # fmt: skip
    assert card.license == {"license": "mit"}


def test_an_adapter(tmp_path):
    config = {"r": 8, "lora_alpha": 16.0, "trainable_token_indices": {"embed_tokens": [1]}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = adapter_card("alice/tuned", RUN, "alice/base", tmp_path)
    assert (card.base, card.relation, card.library) == ("alice/base", "adapter", "peft")
    assert card.facts["adapter"] == "LoRA, rank 8, alpha 16"
    assert card.facts["training"] == "4 steps, 1,008 tokens"
    assert card.figures["perplexity, trained"] == "7"
    assert card.measured_by.startswith("text: `eval.protocol=windows`")
    assert "resize_token_embeddings" in card.loading
    dense = replace(RUN, summary=Summary.from_json({"quantize": {"nbits": None}}))
    assert "quantized" not in adapter_card("alice/x", dense, "meta/base", tmp_path).summary


def test_an_export(tmp_path):
    (tmp_path / "x-Q4_1.gguf").touch()
    run = _with_export(format="gguf", adapter_form="separate", bits_per_weight=5.0, max_error=0.5,
                       kl=0.125)  # fmt: skip
    card = export_card("alice/gguf", run, tmp_path)
    assert (card.relation, card.library, card.tags) == ("quantized", "gguf", ("gguf",))
    assert card.facts["adapter"] == "separate, beside the model"
    assert card.facts["KL of the export to the quantized model"] == "0.125"
    assert "--lora model/adapter.gguf" in card.loading
    assert "model/x-Q4_1.gguf" in card.loading
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 64}')
    served = export_card(
        "alice/x", _with_export(format="humming", adapter_form="separate"), tmp_path
    )
    assert "--max-lora-rank 64 --lora-modules trained=model/adapter" in served.loading
    merged = export_card("alice/x", _with_export(format="dense", adapter_form="merge"), tmp_path)
    assert (merged.relation, merged.library) == ("finetune", "transformers")
    assert "exported as dense weights." in merged.summary
    untouched = SUMMARY | {"quantize": {"nbits": None}, "export": {"format": "dense"}}
    run = replace(RUN, summary=Summary.from_json(untouched))
    assert "fine-tuned with hqqtrain" in export_card("alice/x", run, tmp_path).summary


def test_a_run_that_measured_nothing():
    card = quantized_card("alice/model", PushedRun({}, Summary()))
    assert card.facts == {}
    assert card.summary.startswith("A model, quantized to few bits")
    assert card.of_base == "whose name is not recorded"
    assert (card.figures, card.measured_by, card.command) == ({}, "", "")
