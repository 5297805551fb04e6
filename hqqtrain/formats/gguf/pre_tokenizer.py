"""Name the rule by which a tokenizer splits a text before it merges bytes, as llama.cpp knows it.

llama.cpp has no rules in its files, but names of rules that it has built in. The rule is found by
the content of tokenizer.json: its regular expression, or its use of GPT-2's.
"""

from collections.abc import Mapping
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WITHOUT_FLAG = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"

_THREE_DIGITS = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}{_PUNCTUATION}{_END}"
_GPT4 = "llama-bpe"
_RULES = {
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{_PUNCTUATION}{_END}": "qwen2",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}": "qwen35",
    rf"{_CASED % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}": "tekken",
    rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}": "gpt-4o",
}
"""Regular expression of tokenizer.json -> llama.cpp's name."""


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> tuple[str, bool]:
    """Return llama.cpp's name of the rule, and whether it is just this rule.

    If llama.cpp has no such rule, the name is that of the nearest.

    Args:
        tokenizer: The content of tokenizer.json, with a byte-level BPE model.
    """
    steps = list(_steps(tokenizer.get("pre_tokenizer")))
    ignores_merges = tokenizer["model"].get("ignore_merges", False)
    match steps:
        case ["gpt2"]:
            return "gpt-2", not ignores_merges
        case ["digits", "gpt2"]:
            return "smollm", not ignores_merges
        case [regex] if regex in _RULES:
            return _RULES[regex], ignores_merges == (_RULES[regex] == "tekken")
        case [regex] if regex == _THREE_DIGITS:
            return (_GPT4 if ignores_merges else "smaug-bpe"), True
    return _nearest(steps, ignores_merges), False


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[str]:
    """Return the steps of a rule: regular expressions, `gpt2`, `digits` or the name of another."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel":
        return ["gpt2"] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return ["digits"]
    if kind == "Split" and pre_tokenizer["behavior"] in ("Isolated", "Removed"):
        pattern = pre_tokenizer["pattern"]
        return [pattern.get("Regex", "").replace(_WITHOUT_FLAG, _CONTRACTIONS) or kind]
    return [kind]


def _nearest(steps: list[str], ignores_merges: bool) -> str:
    """Return the rule that treats digits alike, which matters most."""
    joined = "|".join(steps)
    if r"\p{N}{1,3}" in joined:
        return _GPT4 if ignores_merges else "smaug-bpe"
    if r"\p{N}+" in joined or steps in (["gpt2"], []):
        return "gpt-2"
    if "digits" in steps:
        return "smollm"
    return "qwen2" if r"\p{N}" in joined else "gpt-2"
