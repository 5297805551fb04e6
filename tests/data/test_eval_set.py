"""The held-out set: a sample of the whole text, within its size limit, selected by content."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import hqqtrain
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.packing import IGNORE_INDEX
from hqqtrain.data.sources import dataset_name

TINY = Path(hqqtrain.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.mark.parametrize(("tokens", "length"), [(8192, 512), (32768, 256), (100, 512)])
def test_windows_sample_the_whole_text_within_the_limit(tokenizer, tokens, length):
    chosen = load_eval_set(EvalConfig(tokens=tokens), DataConfig(), tokenizer, length)
    sizes = chosen.end - chosen.begin
    assert tokens - length <= int(sizes.sum()) <= tokens
    assert sizes.max() <= length
    middle = (chosen.begin + chosen.end) / 2 / len(chosen.stream)
    assert len(chosen) < 10 or abs(middle.mean() - 0.5) < 0.2


def test_a_change_in_one_text_moves_no_window_of_another(tokenizer, tmp_path):
    texts = [f"def f{i}(x):\n    return x + {i} * x\n" * 40 for i in range(40)]

    def chosen(texts: list[str]) -> set[bytes]:
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        evaluation = EvalConfig(source=str(file), tokens=4096)
        pieces = load_eval_set(evaluation, DataConfig(), tokenizer, 64)
        return {pieces[i]["input_ids"].numpy().tobytes() for i in range(len(pieces))}

    before = chosen(texts)
    after = chosen(["import os\n", *texts[:7], *texts[8:]])
    assert len(before & after) > 0.85 * len(before)


def test_no_window_crosses_the_end_of_a_text(tokenizer):
    chosen = load_eval_set(EvalConfig(tokens=16384), DataConfig(), tokenizer, 256)
    for i in range(len(chosen)):
        assert (chosen[i]["labels"][1:] != IGNORE_INDEX).all()


def test_a_small_text_is_used_completely(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("x = 1\n" * 100)
    evaluation = EvalConfig(source=str(tmp_path / "a.txt"))
    chosen = load_eval_set(evaluation, DataConfig(), tokenizer, 64)
    assert int((chosen.end - chosen.begin).sum()) == len(chosen.stream)


def test_without_a_source_the_set_is_none(tokenizer):
    assert load_eval_set(EvalConfig(source=None), DataConfig(), tokenizer, 64) is None


def test_the_name_describes_the_held_out_set():
    assert "held-out modules" in dataset_name(EvalConfig(), DataConfig())
    assert dataset_name(EvalConfig(source="a"), DataConfig(source="a")) == "a, held-out part"
    assert dataset_name(EvalConfig(source="a"), DataConfig()) == "a"


def test_far_fewer_tokens_than_asked_for_are_a_warning(tokenizer, tmp_path, caplog):
    """A short window may be the first one by its hash, and no long one fits beside it."""
    file, warned = tmp_path / "long.txt", set()
    for words in range(300, 340):
        file.write_text(" ".join(f"value_{i} = {i}" for i in range(words)))
        evaluation = EvalConfig(source=str(file), tokens=500)
        caplog.clear()
        windows = load_eval_set(evaluation, DataConfig(source="x.txt"), tokenizer, 480)
        is_far_less = int((windows.end - windows.begin).sum()) < 250
        assert ("tokens are measured" in caplog.text) == is_far_less
        warned.add(is_far_less)
    assert warned == {True, False}
