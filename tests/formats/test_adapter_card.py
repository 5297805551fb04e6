"""The model card of an adapter: valid front matter, and the facts that its reader needs."""

from dataclasses import replace

import pytest
import yaml

from hqqtrain.formats.adapter_card import AdapterCard, render_card

CARD = AdapterCard("owner/name", "sha256:abc", 2, 64, 1, "least_squares", 2.504)


def _front_matter(card: AdapterCard) -> dict:
    _, front, _ = render_card(card).split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_names_base_quantization_and_fingerprint():
    text = " ".join(render_card(CARD).split())
    assert "`owner/name`, quantized to 2 bits (groups of 64, axis 1, solver `least_squares`" in text
    assert "2.50 bits per weight" in text
    assert "whose fingerprint is sha256:abc" in text
    assert "at revision" not in text
    assert "| figure |" not in text
    assert "calibrated" not in text
    text = render_card(replace(CARD, calibration="a.jsonl", calibration_tokens=16384))
    assert "`least_squares`,\ncalibrated on 16,384 tokens of `a.jsonl`; 2.50 bits" in text


def test_the_card_says_how_to_load_the_base():
    text = render_card(CARD)
    assert 'AutoPeftModelForCausalLM.from_pretrained("<this folder>")' in text
    assert "quant.save=false" not in text
    text = render_card(replace(CARD, has_saved_base=False))
    assert "The run did not save its quantized base (`quant.save=false`)" in text
    assert "AutoPeft" not in text
    assert "model.name_or_path=<run directory>" not in text


def test_optional_facts_appear_where_they_are_known():
    card = replace(CARD, revision="v1", group_size=None, metrics={"perplexity, trained": 6.32104})
    text = render_card(card)
    assert "`owner/name` at revision `v1`" in text
    assert "(a whole row or column, axis 1" in text
    assert "| perplexity, trained | 6.321 |" in text
    assert "Measured on" not in text
    text = render_card(replace(card, measured_by="some text: `eval.protocol=hqq`, context 1,024"))
    assert "6.321 |\n\nMeasured on some text: `eval.protocol=hqq`, context 1,024.\n" in text


def test_a_base_in_full_precision():
    control = AdapterCard("owner/name", "sha256:abc", None, None, None, None, 16)
    text = " ".join(render_card(control).split())
    assert "`owner/name`, which was not quantized (`quant.nbits=null`; 16.00 bits" in text
    assert "adapted layers of the base is sha256:abc" in text
    assert "With PEFT, on `owner/name` itself:" in text
    assert _front_matter(control)["tags"] == ["lora", "hqqtrain"]


def test_the_best_step_is_named():
    text = " ".join(render_card(replace(CARD, best_step=300)).split())
    assert "It is the adapter after optimizer step 300, which had the lowest loss" in text
    assert "optimizer step" not in render_card(CARD)


def test_the_front_matter_is_what_the_hub_reads():
    assert _front_matter(CARD) == {
        "library_name": "peft", "base_model": "owner/name", "tags": ["lora", "hqq", "hqqtrain"],
    }  # fmt: skip


@pytest.mark.parametrize("base", ["tiny", "/models/llama", "a/b/c", ""])
def test_only_hub_names_enter_the_front_matter(base):
    assert "base_model" not in _front_matter(replace(CARD, base=base))


def test_an_existing_folder_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert "base_model" not in _front_matter(CARD)


@pytest.mark.parametrize("base", ['a"b/c: d', "a/b # c", "a/{b}", "a/'b'", "ü/b"])
def test_a_hostile_name_stays_one_string(base):
    found = _front_matter(replace(CARD, base=base))
    assert found["base_model"] == base
    assert found["library_name"] == "peft"


def test_the_tokenizer_is_named():
    assert "Its tokenizer is that of `owner/name`, without changes." in render_card(CARD)
    at_commit = render_card(replace(CARD, revision="v1"))
    assert "Its tokenizer is that of `owner/name` at revision `v1`, without" in at_commit
    text = render_card(replace(CARD, has_tokenizer=True))
    assert "Its tokenizer is in this folder" in text
    assert "without changes" not in text
    assert "new tokens" not in text
    assert "new tokens\nof the training" in render_card(
        replace(CARD, has_tokenizer=True, has_new_tokens=True)
    )


def test_new_tokens_are_named():
    text = render_card(replace(CARD, has_new_tokens=True))
    assert "`model.resize_token_embeddings(len(tokenizer))` first" in text
    assert "resize" not in render_card(CARD)
