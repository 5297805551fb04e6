"""`--help` lists every key, task and recipe."""

from hqqtrain.compose.help import help_text
from hqqtrain.compose.recipes import find_recipes, read_recipe_description
from hqqtrain.compose.schema import known_keys
from hqqtrain.config.run import TASKS


def test_every_key_task_and_recipe_is_listed_with_its_help():
    text = " ".join(help_text().split())
    for key, _ in known_keys():
        if "." in key:
            assert f" {key}=" in text, key
    for task in TASKS:
        assert f" {task} " in text
    for name, file in find_recipes().items():
        assert name in text
        assert read_recipe_description(file) in text


def test_defaults_choices_and_types_are_shown():
    text = " ".join(help_text().split())
    assert "plain 16-bit LoRA (8 | 4 | 3 | 2 | 1 | null)" in text
    assert "quant.skip=[lm_head]" in text
    assert "train.max_steps=null optimizer steps; takes precedence over train.epochs (an" in text


def test_it_fits_a_terminal():
    assert max(map(len, help_text().splitlines())) <= 100
