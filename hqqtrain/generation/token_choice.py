"""Choose the next token by the logits, on the device and without a synchronization."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DEFAULT_TOP_K = 50
"""transformers' own value, for a model that samples and does not say from how many tokens."""

_ELSEWHERE = {
    "no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
"""Settings that transformers' `generate` alone knows, and the values that switch them off."""

_CHOICE = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class TokenChoice:
    """Chooses tokens as transformers does with the same settings.

    Args:
        config: The settings; `unsupported_setting` finds nothing in them.
        vocabulary: Number of tokens of the model.
        device: Where the logits are.
    """

    def __init__(self, config: GenerationConfig, vocabulary: int, device: torch.device) -> None:
        self._warpers = _warpers(config)
        self._samples = bool(config.do_sample)
        self._penalty = config.repetition_penalty or 1.0
        self._seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=device)

    def begin(self, prompt: Tensor) -> None:
        """Begin a text after a prompt, int64 [1, tokens]."""
        self._seen.zero_()
        self._seen.scatter_(1, prompt, True)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next token, int64 [1, 1], for logits [1, vocabulary]."""
        scores = logits.float()
        if self._penalty != 1.0:
            penalized = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
            scores = torch.where(self._seen, penalized, scores)
        if self._samples:
            for warper in self._warpers:
                scores = warper(None, scores)
            # The largest of p / e, with exponential e, is token i with probability p_i. Unlike
            # torch.multinomial, it needs no synchronization.
            noise = torch.empty_like(scores).exponential_()
            scores = scores.softmax(-1) / noise
        token = scores.argmax(-1, keepdim=True)
        self._seen.scatter_(1, token, True)
        return token


def choice_settings(config: GenerationConfig) -> list[object]:
    """Return the settings that choose a token, and those that end a text."""
    return [getattr(config, key) for key in (*_CHOICE, "eos_token_id")]


def unsupported_setting(config: GenerationConfig) -> str | None:
    """Return a setting with which only transformers' `generate` works; None if there is none."""
    for key, off in _ELSEWHERE.items():
        if (value := getattr(config, key, None)) not in (None, off):
            return f"{key}={value}"
    return None


def _warpers(config: GenerationConfig) -> list[Any]:
    """Return what leaves tokens out before one is chosen, in the order of transformers."""
    warpers: list[Any] = []
    if config.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(config.temperature))
    top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if config.top_p is not None and config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers
