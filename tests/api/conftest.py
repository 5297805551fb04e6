"""Fixtures: a small dense model, the same quantized, and its tokenizer."""

import pytest
from small_model import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqqtrain


@pytest.fixture
def dense():
    return AutoModelForCausalLM.from_pretrained(small_model())


@pytest.fixture
def quantized(dense):
    hqqtrain.quantize_model(dense, nbits=2, group_size=32, solver="rtn")
    return dense


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(small_model())


@pytest.fixture
def text_file(tmp_path):
    lines = [f"def f_{number}(x): return x + {number}" for number in range(60)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    return tmp_path / "train.txt"
