"""Tokenization: within limits of time and memory, and only with tokens that the model knows."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.data import tokenization
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.tokenization import check_token_ids, cut_text, encode_texts

TINY = Path(hqqtrain.__file__).parent / "models" / "tiny"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def hostile(**parts) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    for name, part in parts.items():
        setattr(inner, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_an_expensive_pattern_is_refused(monkeypatch):
    monkeypatch.setattr(tokenization, "_BASE_SECONDS", 0.2)
    # The regular expressions of `tokenizers` limit the steps of one match, but not of a search.
    pattern = pre_tokenizers.Split(Regex("a*a*b$"), "isolated")
    with pytest.raises(UserError, match=r"data\.source=x: the tokenizer has used .* too expensive"):
        list(encode_texts(["a" * 1200 + "bc"], hostile(pre_tokenizer=pattern), "data.source=x"))


def test_a_pattern_that_exceeds_the_limit_of_a_match_is_refused():
    pattern = pre_tokenizers.Split(Regex("(a|aa|a?a)+$"), "isolated")
    with pytest.raises(UserError, match=r"data\.source: the tokenizer .* cannot encode its text"):
        list(encode_texts(["a" * 34 + "!"], hostile(pre_tokenizer=pattern)))


def test_a_tokenizer_that_fills_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(tokenization, "_BASE_BYTES", 1 << 23)
    # 2^22 characters with 16 bytes each: glibc maps memory of more than 32 MiB anew each time.
    doubling = normalizers.Sequence([normalizers.Replace("a", "aa")] * 22)
    with pytest.raises(UserError, match="MiB for 1 characters"):
        list(encode_texts(["a"], hostile(normalizer=doubling)))


def test_a_training_beside_the_tokenizer_does_not_count(monkeypatch):
    """A thread that reads data shares its process with a training, which is busy and fills memory.

    The limits are those of real time then.
    """
    monkeypatch.setattr(tokenization, "_BASE_SECONDS", 0.1)
    monkeypatch.setattr(tokenization, "_BASE_BYTES", 1 << 20)
    ends = time.monotonic() + 0.5

    def train() -> list[bytes]:
        memory = [bytes(1 << 24)]
        while time.monotonic() < ends:
            memory[0].count(b"x")
        return memory

    with pytest.raises(UserError, match="too expensive"):
        tokenization.watch(train, 1, "data.source=x")
    ends = time.monotonic() + 0.5
    with ThreadPoolExecutor() as pool:
        assert pool.submit(tokenization.watch, train, 1, "data.source=x").result()
    monkeypatch.setattr(tokenization, "_BASE_SECONDS", 0.005)
    ends = time.monotonic() + 0.5
    with ThreadPoolExecutor() as pool, pytest.raises(UserError, match="too expensive"):
        pool.submit(tokenization.watch, train, 1, "data.source=x").result()


def test_a_tokenizer_that_fails_is_one_message(tokenizer, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such word")

    monkeypatch.setattr(type(tokenizer), "__call__", fail)
    with pytest.raises(UserError, match=r"data\.source: the tokenizer .* cannot encode .* word"):
        list(encode_texts(["x"], tokenizer))


def test_tokens_beyond_the_vocabulary_are_named(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    plain, special = ["def f(x): pass"], ["<|im_start|> def f(x): pass"]
    plain, special = (
        pack_examples(texts, tokenizer, max_seq_len=8).sequences.stream
        for texts in (plain, special)
    )
    check_token_ids(plain, tokenizer, 4096, "data.source=x")  # only tokens in use matter
    check_token_ids(special, tokenizer, 4097, "data.source=x")
    with pytest.raises(UserError) as caught:
        check_token_ids(special, tokenizer, 4096, "data.source=x")
    for part in ("data.source=x", "'<|im_start|>'", "4096 embeddings", "id 4096"):
        assert part in str(caught.value)


@pytest.mark.parametrize("adds", ["nothing", "bos", "bos and eos"])
def test_a_long_text_has_the_tokens_of_the_whole(monkeypatch, tokenizer, adds):
    eos = tokenizer.eos_token
    template = {"nothing": "$A", "bos": f"{eos} $A", "bos and eos": f"{eos} $A {eos}"}[adds]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    text = (TINY.parent.parent / "data" / "packing.py").read_text()
    texts = [text, "x = 1", text[:500]]
    whole = list(encode_texts(texts, tokenizer))
    monkeypatch.setattr(tokenization, "MAX_BATCH_CHARACTERS", 300)
    pieces = list(encode_texts(texts, tokenizer))
    assert len(pieces) == len(whole) == 3
    assert all(map(np.array_equal, pieces, whole))


def test_text_is_cut_where_tokens_end():
    assert cut_text("ab cd\n\nef gh", 9) == ["ab cd\n\n", "ef gh"]
    assert cut_text("ab cd ef", 6) == ["ab cd", " ef"]
    assert cut_text("abcdefgh", 3) == ["abc", "def", "gh"]
    assert cut_text("abc", 3) == ["abc"]
