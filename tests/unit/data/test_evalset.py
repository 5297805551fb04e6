"""The evaluation set: spread over the whole text, no larger than asked."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import hqqtrain
from hqqtrain import data
from hqqtrain.config import DataConfig, EvalConfig

TINY = Path(hqqtrain.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize(("tokens", "length"), [(8192, 512), (1000, 300), (100, 512)])
def test_windows_are_spread_evenly_and_few_enough(tokenizer, tokens, length):
    chosen = data.evaluation_set(EvalConfig(tokens=tokens), DataConfig(), tokenizer, length)
    assert tokens - length < int((chosen.end - chosen.begin).sum()) <= tokens
    middle = (chosen.begin + chosen.end) / 2 / len(chosen.stream)
    assert abs(middle.mean() - 0.5) < 0.02
    assert len(chosen) == 1 or (middle[1:] - middle[:-1]).max() < 1.5 / len(chosen)


def test_a_small_text_is_measured_whole(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x = 1\n" * 100)
    evaluation = EvalConfig(source=str(tmp_path / "a.txt"))
    chosen = data.evaluation_set(evaluation, DataConfig(), tokenizer, 64)
    assert int((chosen.end - chosen.begin).sum()) == len(chosen.stream)


def test_no_source_no_set(tokenizer):
    assert data.evaluation_set(EvalConfig(source=None), DataConfig(), tokenizer, 64) is None


def test_the_name_says_what_was_measured():
    assert "held-out modules" in data.dataset_name(EvalConfig(), DataConfig())
    assert data.dataset_name(EvalConfig(source="a"), DataConfig(source="a")) == "a, held-out part"
    assert data.dataset_name(EvalConfig(source="a"), DataConfig()) == "a"
