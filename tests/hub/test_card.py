"""A model card has valid metadata, and what a reader needs."""

import re
from dataclasses import replace

import pytest
import yaml

from hqqtrain.formats.signed_card import is_signed_card, signed_card
from hqqtrain.hub.card import HubCard, is_of_hqqtrain

CARD = HubCard(
    name="alice/model", summary="A model.", facts={"bits": "2"}, loading="Load it.",
    figures={"perplexity": "6.1"}, measured_by="a text", command="python -m hqqtrain",
    versions={"hqqtrain": "0.1.0"}, base="meta/base", tags=("gguf",),
    license={"license": "other", "license_name": "llama3"}, of_base="`meta/base`",
)  # fmt: skip


def _parts(card: HubCard) -> tuple[dict, str]:
    _, metadata, text = card.render().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_metadata():
    metadata, _ = _parts(CARD)
    assert metadata == {
        "base_model": "meta/base", "base_model_relation": "quantized", "license": "other",
        "license_name": "llama3", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["gguf", "hqq", "hqqtrain"],
    }  # fmt: skip
    metadata, _ = _parts(replace(CARD, base=None, license={}))
    assert not {"base_model", "base_model_relation", "license", "language"} & metadata.keys()


def test_the_text():
    _, text = _parts(CARD)
    headings = re.findall("^#+ (.*)$", text, re.MULTILINE)
    assert headings == ["model", "Results", "How to load it", "How it was made", "License"]
    for part in ("| bits | 2 |", "| perplexity | 6.1 |", "Measured on a text.", "Load it.",
                 "```bash\npython -m hqqtrain\n```", "Made with hqqtrain 0.1.0.",
                 "The license is that of the base model, `meta/base`."):  # fmt: skip
        assert part in text
    _, text = _parts(replace(CARD, figures={}, command="", versions={}, license={}))
    headings = re.findall("^#+ (.*)$", text, re.MULTILINE)
    assert headings == ["model", "How to load it", "License"]
    assert "It is not stated here, because it was not found" in text


@pytest.mark.parametrize("metadata", [": : :", "x: !!python/name:os.system", "[" * 5000, "- x"])
def test_damaged_metadata(metadata):
    assert not is_of_hqqtrain(f"---\n{metadata}\n---\n")


def test_a_card_is_recognized():
    text = CARD.render()
    assert is_signed_card(text)
    assert is_of_hqqtrain(text)
    assert is_of_hqqtrain(text.replace("A model.", "My model."))
    for other in ("", "text", "---\ntags: [x]\n---\n", "---\n- 1\n---\n", "---\ntags: 5\n---\n",
                  signed_card("hqqtrain")):  # fmt: skip
        assert not is_of_hqqtrain(other)
