"""The model's own settings hold where no others are given, and hostile files are refused."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from hqqtrain.common.errors import UserError
from hqqtrain.generation.settings import (
    Sampling,
    merged_generation_config,
    read_generation_config,
)

OWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]}


def merged(own: dict, ends: tuple = (), **sampling) -> GenerationConfig:
    return merged_generation_config(
        GenerationConfig(**own), Sampling(**sampling), ends, max_new_tokens=5, cache_tokens=None,
        compile_anywhere=False,
    )  # fmt: skip


def test_settings_that_are_given_replace_those_of_the_model():
    config = merged(OWN, temperature=0.2, repetition_penalty=1.1)
    assert (config.do_sample, config.temperature, config.top_p) == (True, 0.2, 0.9)
    assert (config.repetition_penalty, config.max_new_tokens) == (1.1, 5)


def test_temperature_0_takes_the_most_likely_token_whatever_the_model_says():
    config = merged(OWN, temperature=0.0, top_k=5)
    assert config.do_sample is False
    assert (config.temperature, config.top_k, config.top_p) == (None, None, None)


def test_a_filter_alone_samples():
    assert merged({}, top_p=0.5).do_sample is True
    assert not merged({}, repetition_penalty=1.5).do_sample
    assert not merged({}).do_sample


def test_the_ends_of_a_turn_join_those_of_the_model():
    assert merged(OWN, ends=(9,)).eos_token_id == [2, 7, 9]
    assert merged({"eos_token_id": 3}).eos_token_id == [3]
    assert (merged({}).eos_token_id, merged({}).pad_token_id) == (None, None)
    assert merged(OWN).pad_token_id == 2


def test_settings_that_do_not_fit_a_stream_are_not_taken_from_the_model():
    own = {"num_beams": 4, "max_length": 9, "output_scores": True, "num_return_sequences": 2}
    config = merged(own)
    assert (config.num_beams, config.num_return_sequences, config.max_length) == (1, 1, None)
    assert config.disable_compile


def test_a_static_cache_is_compiled_also_on_a_cpu_if_the_caller_says_so():
    config = merged_generation_config(
        GenerationConfig(), Sampling(), (), max_new_tokens=5, cache_tokens=1024,
        compile_anywhere=True,
    )  # fmt: skip
    assert (config.cache_implementation, config.max_cache_len) == ("static", 1024)
    assert config.compile_config is not None
    assert not config.disable_compile


def test_a_file_is_read(tmp_path: Path):
    file = tmp_path / "generation_config.json"
    assert read_generation_config(file).eos_token_id is None
    file.write_text(json.dumps(OWN | {"num_beams": 4, "unknown": {}}))
    config = read_generation_config(file)
    assert (config.temperature, config.eos_token_id) == (0.6, [2, 7])
    assert config.num_beams is None


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}', '{"top_p": {}}',
        '{"temperature": "hot"}', '{"top_k": [1]}', '{"temperature": NaN}', '{"do_sample": 1}',
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text):
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be used"):
        read_generation_config(file)
