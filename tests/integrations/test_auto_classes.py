"""`from_config` builds no dense model that claims to be quantized."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from hqqtrain import HqqTrainConfig
from hqqtrain.common.errors import UserError


def test_from_config(make_trained, tmp_path: Path):
    config = AutoConfig.from_pretrained(make_trained().save(tmp_path / "quantized"))
    for settings in (config.quantization_config, HqqTrainConfig()):
        config.quantization_config = settings
        with pytest.raises(UserError, match="from_config: builds dense layers with random"):
            AutoModelForCausalLM.from_config(config)
    config.quantization_config = None  # as the message says
    assert AutoModelForCausalLM.from_config(config).num_parameters()
