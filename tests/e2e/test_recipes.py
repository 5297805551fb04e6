"""Every shipped recipe composes, is valid, has a description and builds its model, offline."""

import pytest
import torch

from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.expand import expand_jobs
from hqqtrain.compose.recipes import find_recipes, read_recipe_description
from hqqtrain.config.run import RunConfig
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.source import shipped_folder
from hqqtrain.nn.replace import quantize_model

EXPECTED_BILLIONS = {
    "tiny": (0.004, 0.006),
    "meta-llama/Meta-Llama-3-8B": (8.0, 8.1),
    "meta-llama/Meta-Llama-3-70B": (70.0, 71.0),
    "meta-llama/Meta-Llama-3-8B-Instruct": (8.0, 8.1),
    "Qwen/Qwen3-8B": (8.1, 8.2),
}


def _configs(recipe: str) -> list[RunConfig]:
    """Return the configuration of every job of a recipe; only a sweep has several."""
    jobs = expand_jobs([f"recipe={recipe}"], multirun=False)
    return [composed.checked() for _, composed in jobs]


def test_the_documented_recipes_exist():
    documented = {"tiny_2bit", "llama8b_4bit", "llama8b_2bit", "llama70b_2bit", "sweep_bits"}
    documented |= {"tiny_chat", "llama8b_chat_4bit", "qwen3_chat"}
    assert documented <= find_recipes().keys()


@pytest.mark.parametrize("name", sorted(find_recipes()))
def test_a_recipe_starts_with_a_description(name):
    text = read_recipe_description(find_recipes()[name])
    assert text.endswith(".")
    assert 20 < len(text) < 95


@pytest.mark.parametrize("name", sorted(find_recipes()))
def test_a_recipe_builds_its_quantized_model_on_meta(name: str):
    for config in _configs(name):
        _build(config)


def _build(config: RunConfig) -> None:
    folder = shipped_folder(config.model.name_or_path)
    assert folder is not None, "ship its config.json in hqqtrain/models/configs"
    hf_config = load_hf_config(folder)
    model = build_meta(hf_config)
    low, high = EXPECTED_BILLIONS[config.model.name_or_path]
    assert low < model.num_parameters() / 1e9 < high
    report = quantize_model(model, config.quant)
    assert {spec.nbits for spec in report.quantized.values()} == {config.quant.nbits}
    assert len(report.quantized) == 7 * hf_config.num_hidden_layers
    assert all(p.device == torch.device("meta") for p in model.parameters())


def test_the_names_of_recipes_agree_with_nbits():
    for name in find_recipes():
        if name.endswith("bit"):
            assert compose_config([f"recipe={name}"]).quant.nbits == int(name[-4])


def test_recipes_of_chats_train_the_answers():
    for name in find_recipes():
        if "chat" in name:
            data = compose_config([f"recipe={name}"]).data
            assert (data.format, data.loss_on) in [("auto", "auto"), ("chat", "assistant")]
            # The tiny model is the only one without a chat template of its own.
            assert data.chat_template == ("chatml" if name == "tiny_chat" else "auto")


def test_the_default_recipe_needs_no_network():
    config = compose_config(["recipe=tiny_2bit"])
    sources = (config.model.name_or_path, config.data.source, config.eval.source)
    assert sources == ("tiny", "python_stdlib", "auto")
