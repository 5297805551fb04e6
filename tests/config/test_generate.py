"""Values of the group `generate` that are not allowed, and settings that cannot be combined."""

import pytest

from hqqtrain.config.field import field_errors
from hqqtrain.config.generate import GenerateConfig
from hqqtrain.config.run import RunConfig


def _errors(**keys) -> list[str]:
    config = GenerateConfig(**keys)
    return [*field_errors("generate", config), *config.errors()]


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"prompt": "Hello"}, {"prompt": ["a", "b"]}, {"chat": False, "compile": True},
        {"temperature": 0.0, "top_p": 1.0, "top_k": 0}, {"system": "Be brief.", "chat": "auto"},
    ],
)  # fmt: skip
def test_sound_values(keys):
    assert _errors(**keys) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": []}, "generate.prompt=[]: must be text"),
        ({"prompt": ["a", " "]}, "must be text, or a list of texts"),
        ({"prompt": 5}, "generate.prompt=5: must be text"),
        ({"chat": "yes"}, "generate.chat=yes: allowed are auto, true, false."),
        ({"compile": None}, "generate.compile=null: allowed are auto, true, false."),
        ({"use": "base"}, "generate.use=base: allowed are auto, trained, quantized"),
        ({"temperature": -1.0}, "must be at least 0"),
        ({"temperature": float("nan")}, "must be finite"),
        ({"top_p": 1.5}, "must be at most 1"),
        ({"top_p": 0.0}, "use temperature=0"),
        ({"repetition_penalty": 0.0}, "must be above 0"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"system": "x", "chat": False}, "leave one of the two out"),
    ],
)
def test_values_that_are_not_allowed(keys, message):
    assert message in "\n".join(_errors(**keys))


def test_the_texts_change_no_run():
    config = RunConfig(generate=GenerateConfig(prompt="x", seed=3))
    assert config.identity() == RunConfig().identity()
    assert RunConfig(task="generate").has_run_directory is False
    assert RunConfig().has_run_directory
