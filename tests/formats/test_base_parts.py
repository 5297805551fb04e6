"""The tensors of an adapter that are not LoRA matrices, matched with its configuration."""

import pytest
from peft import LoraConfig

from hqqtrain.common.errors import UserError
from hqqtrain.formats.base_parts import TOKENS_SUFFIX, BaseParts, read_base_parts

ROWS = f"model.embed_tokens{TOKENS_SUFFIX}"
MODEL = {"model.norm.weight": (32,), "model.embed_tokens.weight": (96, 32)}


def test_modules_and_rows_are_found_by_the_ends_of_their_names():
    config = LoraConfig(modules_to_save=["norm"], trainable_token_indices={"embed_tokens": [5, 7]})
    parts = {"model.norm.weight": (32,), ROWS: (2, 32)}
    found = read_base_parts(config, parts, MODEL, "adapter")
    assert found == BaseParts(["model.norm"], {"model.embed_tokens": [5, 7]})
    again = found.add_to(LoraConfig())
    assert again.modules_to_save == ["model.norm"]
    assert again.trainable_token_indices == {"model.embed_tokens": [5, 7]}


def test_an_adapter_of_lora_alone_has_no_parts():
    assert read_base_parts(LoraConfig(), {}, MODEL, "adapter") == BaseParts()
    assert BaseParts().add_to(LoraConfig()).modules_to_save is None


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        ({}, {"model.norm.weight": (32,)}, "which modules_to_save does not name"),
        ({"modules_to_save": ["norm"]}, {}, "modules_to_save has norm, but no tensor"),
        ({"modules_to_save": ["norm"]}, {"model.norm.weight": (33,)}, "belongs to another model"),
        ({"trainable_token_indices": [5]}, {ROWS: (2, 32)}, "a row for each of the tokens"),
        ({"trainable_token_indices": [96]}, {ROWS: (1, 32)}, "has only 96 rows"),
    ],
)
def test_parts_that_do_not_fit_are_refused(config, parts, message):
    with pytest.raises(UserError, match=message):
        read_base_parts(LoraConfig(**config), parts, MODEL, "adapter")
