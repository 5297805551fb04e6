"""Tokenizers of bytes and of SentencePiece's kind are written as llama.cpp reads them."""

import json
import logging
import shutil

import pytest
from gguf import GGUFWriter
from spm_tokenizers import SPACE, save_spm_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hqqtrain.common.errors import UserError
from hqqtrain.formats.gguf import tokenizer as types
from hqqtrain.formats.gguf.tokenizer import write_tokenizer
from hqqtrain.models.source import TINY_FOLDER


def _keys(folder, vocab_size: int, settings=None) -> dict:
    writer = GGUFWriter(None, "llama")
    write_tokenizer(writer, folder, vocab_size, settings or folder)
    prefix = "tokenizer."
    return {k.removeprefix(prefix).removeprefix("ggml."): v.value
            for k, v in writer.kv_data[0].items() if prefix in k}  # fmt: skip


def test_the_bundled_tokenizer():
    keys, tokenizer = _keys(TINY_FOLDER, 4100), AutoTokenizer.from_pretrained(TINY_FOLDER)
    assert (keys["model"], keys["pre"]) == ("gpt2", "gpt-2")
    assert keys["tokens"][:4096] == tokenizer.convert_ids_to_tokens(range(4096))
    assert keys["tokens"][4096:] == [f"[PAD{i}]" for i in range(4096, 4100)]
    assert keys["token_type"][0] == types.CONTROL
    assert keys["token_type"][300] == types.NORMAL
    assert keys["token_type"][4096] == types.UNUSED
    assert keys["merges"][:2] == ["Ġ Ġ", "ĠĠ ĠĠ"]
    assert (keys["add_bos_token"], keys["eos_token_id"]) == (False, 0)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    """Scores decrease in the order of the merges, so the earliest merge is the best one."""
    tokenizer = save_spm_tokenizer(tmp_path, prefix=prefix)
    size = len(tokenizer)
    keys = _keys(tmp_path, size)
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    scores = dict(zip(keys["tokens"], keys["scores"], strict=True))
    results = ["".join(pair) for pair in merges]
    assert sorted(results, key=lambda token: -scores[token]) == results
    assert (keys["model"], keys["pre"], keys["add_space_prefix"]) == ("llama", "default", prefix)
    kinds = dict(zip(keys["tokens"], keys["token_type"], strict=True))
    assert kinds["<0x0A>"] == types.BYTE
    assert kinds["<unk>"] == types.UNKNOWN
    assert kinds["<s>"] == types.CONTROL
    assert kinds["==>"] == types.USER_DEFINED
    assert kinds[SPACE * 2] == types.NORMAL  # a merge makes it of two spaces
    assert kinds[results[-1]] == types.NORMAL
    assert (keys["add_bos_token"], keys["bos_token_id"], keys["add_eos_token"]) == (True, 1, False)


def test_the_end_of_a_turn_and_the_template(tmp_path):
    shutil.copytree(TINY_FOLDER, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    keys = _keys(tmp_path / "model", 4096, settings)
    assert (keys["eos_token_id"], keys["eot_token_id"]) == (0, 7)
    assert keys["chat_template"] == "{{ messages }}"


def test_a_rule_that_llama_cpp_lacks_is_reported(tmp_path, caplog):
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        keys = _keys(tmp_path, 3)
    assert keys["pre"] == "gpt-2"
    assert "no rule that splits texts just as the tokenizer" in caplog.text


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path):
    backend = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)]))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer of the kind Unigram"):
        _keys(tmp_path, 2)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused():
    with pytest.raises(UserError, match="has a token 4095, and the embedding of the model has 96"):
        _keys(TINY_FOLDER, 96)
