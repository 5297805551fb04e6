"""A checkpoint of hqq is loaded by transformers 4, or refused: never with random weights."""

from pathlib import Path

import pytest
from exports import write_export
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError


def test_transformers_5_does_not_load_an_hqq_checkpoint_as_garbage(make_trained, tmp_path: Path):
    write_export(make_trained(nbits=4, group_size=16), "hqq", tmp_path / "hqq")
    with pytest.raises(UserError, match=r"/hqq: hqq has quantized this model, .* task=quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hqq")
