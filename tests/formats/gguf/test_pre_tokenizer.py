"""The rule by which a tokenizer splits a text is found by its content."""

import pytest

from hqqtrain.formats.gguf.pre_tokenizer import pre_tokenizer_name

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = GPT2 | {"use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = TEKKEN.replace(r"]+|[", r"]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[", 1).replace(
    r"]*|\p{N}", r"]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
)


def _split(regex: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


@pytest.mark.parametrize(
    ("rule", "ignores_merges", "name", "is_known"),
    [
        (GPT2, False, "gpt-2", True),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                GPT2]}, False, "smollm", True),
        (_split(LLAMA3), True, "llama-bpe", True), (_split(LLAMA3), False, "smaug-bpe", True),
        (_split(QWEN2), False, "qwen2", True), (_split(TEKKEN), True, "tekken", True),
        (_split(GPT4O), False, "gpt-4o", True),
        (_split(LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)",
                               "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")),
         True, "llama-bpe", True),
        (_split(r"\p{N}{1,3}|.+"), True, "llama-bpe", False),
        (_split(r"\p{N}|.+"), False, "qwen2", False),
        (_split(r"\w+"), False, "gpt-2", False), (None, False, "gpt-2", False),
        (GPT2, True, "gpt-2", False),
    ],
)  # fmt: skip
def test_the_name_of_a_rule(rule, ignores_merges, name, is_known):
    tokenizer = {"pre_tokenizer": rule, "model": {"ignore_merges": ignores_merges}}
    assert pre_tokenizer_name(tokenizer) == (name, is_known)
