"""The user's own recipes: where they are found, what they may extend, and errors in them."""

import os
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.expand import expand_jobs
from hqqtrain.compose.recipes import RECIPES_VARIABLE, find_recipes, read_recipe_description


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    """Return ./recipes of an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RECIPES_VARIABLE, raising=False)
    folder = tmp_path / "recipes"
    folder.mkdir()
    return folder


def _write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def _message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose_config(list(overrides))
    return str(caught.value)


def test_a_recipe_in_the_working_directory(recipes):
    _write(recipes, "mine", "# Mine.\nquant: {nbits: 3}\n")
    config = compose_config(["recipe=mine"])
    assert (config.recipe, config.quant.nbits, config.quant.group_size) == ("mine", 3, 64)
    assert config.run_name().startswith("mine-")
    assert read_recipe_description(find_recipes()["mine"]) == "Mine."


def test_a_recipe_may_extend_a_built_in_one(recipes):
    _write(recipes, "mine", "defaults: [tiny_2bit, _self_]\nadapter: {r: 4}\n")
    config = compose_config(["recipe=mine"])
    assert (config.quant.nbits, config.adapter.r, config.train.max_seq_len) == (2, 4, 256)


def test_the_variable_precedes_the_working_directory_and_that_the_built_in(recipes, monkeypatch):
    _write(recipes, "tiny_2bit", "quant: {nbits: 3}\n")
    assert compose_config(["recipe=tiny_2bit"]).quant.nbits == 3
    listed = recipes.parent / "listed"
    _write(listed, "tiny_2bit", "quant: {nbits: 8}\n")
    monkeypatch.setenv(RECIPES_VARIABLE, str(listed))
    assert compose_config(["recipe=tiny_2bit"]).quant.nbits == 8


def test_built_in_recipes_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"tiny_2bit", "llama8b_4bit", "llama8b_2bit", "llama70b_2bit"} <= find_recipes().keys()


def test_a_broken_recipe_only_affects_its_own_runs(recipes):
    _write(recipes, "broken", "quant: [unclosed\n")
    assert compose_config(["recipe=tiny_2bit"]).quant.nbits == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quant:\n  nbits: 2\n bad: 1\n", "mine.yaml:3:2: not valid YAML:"),
        ("quant: {nbits: 2\n", "mine.yaml:2:1: not valid YAML:"),
        ("quant: {nbits: 2, nbits: 3}\n", "mine.yaml:1:19: not valid YAML: found duplicate key"),
        ("\tquant: 1\n", "mine.yaml:1:1: not valid YAML:"),
        ("quant: {nbit: 2}\n", "mine.yaml: quant.nbit: unknown key. Did you mean 'quant.nbits'?"),
        ("nbits: 2\n", "mine.yaml: nbits: unknown key. Did you mean 'quant.nbits'?"),
        ("quant: {nbits: two}\n", "mine.yaml: quant.nbits=two: must be an integer or null."),
        ("quant: 3\n", "mine.yaml: quant=3: must be a mapping of keys"),
        ("recipe: other\n", "mine.yaml: recipe: not allowed here"),
        ("- quant\n", "mine.yaml: must be a mapping of keys"),
        ("just words\n", "mine.yaml: just words: unknown key."),
        ("hydra: {mode: MULTIRUN}\n", "mine.yaml: hydra.mode: unknown key."),
        ("defaults: [tiny_3bit, _self_]\n", "recipe=tiny_3bit: no such recipe."),
        ("defaults: [{override /model: llama9b}]\n", "model=llama9b: no such option."),
        ("sweep: 3\n", "mine.yaml: sweep=3: must be a mapping"),
        ("quant: {nbits: 7}\n", "quant.nbits=7: allowed are 8, 4, 3, 2, 1, null."),
    ],
)
def test_an_error_in_a_recipe_names_the_file(recipes, text, expected):
    _write(recipes, "mine", text)
    assert expected in _message("recipe=mine")


def test_all_unknown_keys_are_reported_at_once(recipes):
    _write(recipes, "mine", "quant: {nbit: 2, axs: 1}\ntrain: {step: 3}\n")
    lines = _message("recipe=mine").splitlines()
    assert [line.split(":")[0] for line in lines[3:]] == ["Keys of quant", "Keys of train"]


def test_bytes_that_are_not_text(recipes):
    (recipes / "mine.yaml").write_bytes(b"quant: {nbits: \xff\xfe}\n")
    assert "mine.yaml" in _message("recipe=mine")


def test_an_empty_recipe_gives_the_defaults(recipes):
    _write(recipes, "mine", "")
    assert compose_config(["recipe=mine"]).identity() == compose_config([]).identity()


def test_a_recipe_that_sweeps(recipes):
    _write(recipes, "mine", "sweep:\n  quant.nbits: 2,3\n  train.seed: range(0,2)\n")
    jobs = expand_jobs(["recipe=mine"], multirun=False)
    assert [words for words, _ in jobs] == [
        ["recipe=mine", f"quant.nbits={nbits}", f"train.seed={seed}"]
        for nbits in (2, 3)
        for seed in (0, 1)
    ]


def test_a_sweep_over_a_key_that_does_not_exist(recipes):
    _write(recipes, "mine", "sweep:\n  quant.nbit: 2,3\n")
    with pytest.raises(UserError, match=r"quant\.nbit: unknown key"):
        [composed.checked() for _, composed in expand_jobs(["recipe=mine"], multirun=False)]


@pytest.mark.parametrize("name", ["mine.yaml", "./mine.yaml", "./mine", "{folder}/mine.yaml"])
def test_a_recipe_may_be_the_path_of_a_file(recipes, name):
    _write(recipes.parent, "mine", "# Mine.\ndefaults: [tiny_2bit, _self_]\nquant: {nbits: 3}\n")
    config = compose_config([f"recipe={name.format(folder=recipes.parent)}"])
    assert (config.recipe, config.quant.nbits, config.train.max_seq_len) == ("mine", 3, 256)
    assert config.run_name().startswith("mine-")


def test_a_path_precedes_a_recipe_of_the_same_name(recipes):
    _write(recipes, "tiny_2bit", "quant: {nbits: 8}\n")
    (recipes.parent / "tiny_2bit.yml").write_text("quant: {nbits: 3}\n")
    assert compose_config(["recipe=./tiny_2bit.yml"]).quant.nbits == 3
    assert compose_config(["recipe=tiny_2bit"]).quant.nbits == 8


def test_a_path_may_be_a_sweep(recipes):
    _write(recipes.parent, "mine", "sweep: {quant.nbits: '2,3'}\n")
    jobs = expand_jobs(["recipe=./mine.yaml"], multirun=False)
    assert [composed.checked().quant.nbits for _, composed in jobs] == [2, 3]


def test_errors_in_a_file_name_the_file(recipes):
    _write(recipes.parent, "mine", "quant: {nbit: 3}\n")
    assert _message("recipe=./mine.yaml").startswith("mine.yaml: quant.nbit: unknown key")
    assert "Did you mean 'mine.yaml'?" in _message("recipe=./mien.yaml")
    assert "no such recipe" in _message(f"recipe={recipes}")


def test_a_pipe_among_the_recipes_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "mine.yaml")
    monkeypatch.setenv(RECIPES_VARIABLE, str(tmp_path))
    assert "mine" not in find_recipes()


@pytest.mark.parametrize("name", ["./", "/", "..", "./mine.json", "./folder", "./M.YAML"])
def test_a_path_that_is_no_yaml_file_is_named(recipes, monkeypatch, name):
    monkeypatch.chdir(recipes)
    (recipes / "folder").mkdir()
    for file in ("mine.json", "M.YAML"):
        (recipes / file).write_text("quant: {nbits: 2}")
    message = _message(f"recipe={name}")
    assert f"recipe={name}: no such recipe" in message
    assert ("must be a file whose name ends with .yaml" in message) == (name != "..")


def test_dotted_keys_in_a_recipe_are_refused_with_the_right_form(recipes):
    _write(recipes, "mine", "quant.nbits: 2\noptim.lr: 1e-4\n")
    message = _message("recipe=mine")
    assert "mine.yaml: quant.nbits: a recipe has a mapping" in message
    assert "write optim: {lr: ...}." in message


def test_all_faults_of_a_recipe_are_reported_at_once(recipes):
    _write(recipes, "mine", "quant: {nbits: two, nbit: 2, axis: down}\nrecipe: x\ntrain: 3\n")
    keys = ("quant.nbits=two", "quant.nbit:", "quant.axis=down", "recipe: not", "train=3")
    lines = _message("recipe=mine", "optim.lr=slow").splitlines()
    begins = (*keys, "optim.lr=slow", "Keys of quant: ")
    assert len(lines) == len(begins)
    assert all(sum(begin in line for line in lines) == 1 for begin in begins)


@pytest.mark.parametrize("extension", ["yaml", "yml"])
def test_the_name_of_a_file_in_the_working_directory_suggests_its_path(recipes, extension):
    (recipes.parent / f"mine.{extension}").write_text("quant: {nbits: 3}\n")
    assert f"Did you mean 'recipe=./mine.{extension}'?" in _message("recipe=mine")
    assert compose_config([f"recipe=./mine.{extension}"]).quant.nbits == 3
