"""Older programs find the rotary embeddings, and transformers 5 reads the same configuration."""

import json

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from hqqtrain.formats.older_keys import with_older_keys

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "rope", "expected"),
    [
        ("llama", {"rope_type": "default"}, {"rope_theta": 5e5}),
        ("llama", LLAMA3, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("qwen2", YARN, {"rope_theta": 5e5, "rope_scaling": YARN}),
        ("glm4", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5}),
    ],
)
def test_rotary_embeddings(tmp_path, model_type, rope, expected):
    config = CONFIG_MAPPING[model_type](
        rope_parameters={"rope_type": "default", "rope_theta": 5e5} | rope, dtype="bfloat16"
    )
    written = with_older_keys(json.loads(config.to_json_string()))
    assert expected.items() <= written.items()
    assert ("rope_scaling" in written) == ("rope_scaling" in expected)
    assert written["torch_dtype"] == "bfloat16"
    assert _read(tmp_path, written).rope_parameters == config.rope_parameters


def test_layers_with_their_own_base(tmp_path):
    config = CONFIG_MAPPING["gemma3_text"]()
    written = with_older_keys(json.loads(config.to_json_string()))
    assert written["rope_theta"] == 1e6
    assert written["rope_local_base_freq"] == 1e4
    assert _read(tmp_path, written).rope_parameters == config.rope_parameters


def test_a_part_of_a_configuration(tmp_path):
    written = with_older_keys({"text_config": {"rope_parameters": {"rope_theta": 7.0}}})
    assert written["text_config"]["rope_theta"] == 7.0
    assert with_older_keys({"model_type": "gpt2"}) == {"model_type": "gpt2"}


def _read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)
