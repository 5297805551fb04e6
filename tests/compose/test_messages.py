"""Messages for mistakes that Hydra, OmegaConf or YAML find: key, value, what is allowed, fix."""

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException

from hqqtrain.common.errors import UserError
from hqqtrain.compose.messages import (
    broken_yaml_error,
    check_type,
    expected_type,
    missing_config_error,
    unknown_recipe_error,
    unreadable_override_error,
)
from hqqtrain.compose.schema import known_keys


def test_an_unknown_recipe_gets_a_suggestion_the_list_and_a_way_to_add_it():
    message = str(unknown_recipe_error("tiny2bit"))
    assert message.startswith("recipe=tiny2bit: no such recipe. Did you mean 'tiny_2bit'? Recipes:")
    assert "create ./recipes/tiny2bit.yaml or set HQQTRAIN_RECIPES" in message


def test_a_missing_recipe_of_a_defaults_list_is_an_unknown_recipe():
    error = MissingConfigException("missing", "recipe/tiny", [])
    assert str(missing_config_error(error)) == str(unknown_recipe_error("tiny"))


@pytest.mark.parametrize("options", [None, [], ["llama8b", "tiny"]])
def test_a_missing_option_lists_what_is_allowed(options):
    message = str(missing_config_error(MissingConfigException("missing", "model/llama", options)))
    assert message.startswith("model=llama: no such option.")
    assert all(option in message for option in options or ())
    assert "that --help lists" in message


@pytest.mark.parametrize(
    ("word", "example"),
    [
        ("data.source=a(1).txt", "\"data.source='a(1).txt'\""),
        ("data.source='a", "\"data.source='my (1).txt'\""),
        ("data.source=$x(", "\"data.source='my (1).txt'\""),
        ("quant.skip=a(1)", "'quant.skip=[\"a(1)\"]'"),
        ("+quant.skip=[a(", '\'quant.skip=["one (1)","another"]\''),
    ],
)
def test_an_unreadable_argument_gets_an_example_in_quotes(word, example):
    with pytest.raises(OverrideParseException) as caught:
        OverridesParser.create().parse_overrides([word])
    message = str(unreadable_override_error(caught.value))
    assert message.startswith(f"{word}: must be key=value; ")
    assert f"as in {example}. " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant.nbits", 2), ("quant.nbits", "2"), ("quant.group_size", None), ("optim.lr", 1),
        ("quant.skip", []), ("quant.overrides", {"*.q_proj": None}), ("train.packing", True),
        ("quant", {"nbits": 3}),
    ],
)  # fmt: skip
def test_values_of_the_right_type_pass(key, value):
    check_type(key, value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant.nbits", "two", "quant.nbits=two: must be an integer or null."),
        ("quant.axis", None, "quant.axis=null: must be an integer."),
        ("quant.nbits", [2], "quant.nbits=[2]: must be an integer or null."),
        ("quant.group_size", 1.5, "quant.group_size=1.5: must be an integer or null."),
        (
            "quant.skip",
            "lm_head",
            "quant.skip=lm_head: must be a list of strings, as in 'quant.skip=[lm_head]'.",
        ),
        ("quant", 3, "quant=3: must be a mapping of keys, such as those of quant in --help."),
        ("quant", {"nbits": "x"}, "quant.nbits=x: must be an integer or null."),
    ],
)
def test_a_wrong_type_names_the_key_its_value_and_the_type(key, value, message):
    with pytest.raises(UserError) as caught:
        check_type(key, value, "mine.yaml: ")
    assert str(caught.value) == f"mine.yaml: {message}"


def test_every_key_has_a_type_in_words():
    for key, _ in known_keys():
        words = expected_type(key)
        assert words
        assert "<class" not in words, key


@pytest.mark.parametrize(
    ("text", "place"),
    [("a: [1", ":1:6"), ("a: 1\nb: 2: 3\n", ":2:5"), ("\tb: 1", ":1:1"), ("a: *x", ":1:4")],
)
def test_broken_yaml_names_line_and_column(text, place):
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load(text)
    message = str(broken_yaml_error(caught.value, "mine.yaml"))
    assert message.startswith(f"mine.yaml{place}: not valid YAML: ")
    assert "\n" not in message


def test_bytes_that_yaml_refuses_without_a_line_still_name_the_file():
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("a: \x01")
    assert str(broken_yaml_error(caught.value, "mine.yaml")).startswith(
        "mine.yaml: not valid YAML: "
    )
