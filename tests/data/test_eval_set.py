"""The held-out set: a sample of the whole text, within its size limit, selected by content."""

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import hqqtrain
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.sequences import IGNORE_INDEX
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
        evaluation = EvalConfig(source=str(file), tokens=480)
        caplog.clear()
        windows = load_eval_set(evaluation, DataConfig(source="x.txt"), tokenizer, 480)
        is_far_less = int((windows.end - windows.begin).sum()) < 240
        assert ("tokens are measured" in caplog.text) == is_far_less
        warned.add(is_far_less)
    assert warned == {True, False}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """Return a file of 40 texts of 10 to 2,000 tokens."""
    file = tmp_path_factory.mktemp("texts") / "a.jsonl"
    rows = ["\n".join(f"value_{i} = {i * j}" for i in range(5 * j + 2)) for j in range(40)]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(file)


def bounds(texts: str, tokenizer, tokens: int, length: int) -> list[tuple[int, int]]:
    evaluation = EvalConfig(source=texts, tokens=tokens)
    chosen = load_eval_set(evaluation, DataConfig(source="x.txt"), tokenizer, length)
    return list(zip(chosen.begin.tolist(), chosen.end.tolist(), strict=True))


@pytest.mark.parametrize("length", [64, 256, 2047])
@pytest.mark.parametrize("tokens", [2, 3, 99, 300, 1000, 4095, 4100])
def test_exactly_as_many_tokens_as_asked_for(texts, tokenizer, tokens, length):
    sizes = [end - begin for begin, end in bounds(texts, tokenizer, tokens, length)]
    assert sum(sizes) in (tokens, tokens - 1)  # a window of one token predicts nothing
    assert max(sizes) <= length
    assert min(sizes) > 1


def test_only_the_last_window_by_hash_is_cut(texts, tokenizer):
    whole, cut, everything = (bounds(texts, tokenizer, n, 128) for n in (2048, 2100, 128 * 10**6))
    assert set(whole) < set(cut)
    assert sum(end - begin for begin, end in cut) == 2100
    ((begin, end),) = set(cut) - set(everything)
    assert any(begin == other[0] and end < other[1] for other in everything)
    assert cut == sorted(cut)


@pytest.mark.parametrize(("tokens", "length"), [(512, 512), (2048, 128), (4096, 64), (4096, 1024)])
def test_a_multiple_of_the_window_is_measured_in_whole_windows(texts, tokenizer, tokens, length):
    """Users compare such figures with those of before the last window was cut."""
    everything = bounds(texts, tokenizer, 10**6 * length, length)
    stream = load_eval_set(
        EvalConfig(source=texts), DataConfig(source="x.txt"), tokenizer, length
    ).stream
    expected, total = [], 0
    for begin, end in sorted(
        everything,
        key=lambda b: hashlib.sha256(stream[slice(*b)].astype("<i4").tobytes()).digest()[:8],
    ):
        total += end - begin
        if total <= tokens:
            expected.append((begin, end))
    assert bounds(texts, tokenizer, tokens, length) == sorted(expected)


@pytest.mark.parametrize(("words", "tokens", "hints"), [(50, 4096, 1), (50, 99, 0), (9000, 99, 0)])
def test_a_tiny_held_out_text_gets_one_hint(tokenizer, tmp_path, caplog, words, tokens, hints):
    (tmp_path / "a.txt").write_text("\n".join(f"value_{i} = {i}" for i in range(words)))
    (tmp_path / "b.txt").write_text("another text\n")
    evaluation = EvalConfig(source=str(tmp_path / "a.txt"), tokens=tokens)
    load_eval_set(evaluation, DataConfig(source=str(tmp_path / "b.txt")), tokenizer, 64)
    assert len([line for line in caplog.messages if "mostly noise" in line]) == hints
    assert len(caplog.messages) == hints
