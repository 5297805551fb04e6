"""Receive tokens while transformers generates them: decode, measure the time, find the end."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextStreamer


class ReplyStreamer(TextStreamer):
    """Passes the text of one reply on, a few characters at a time.

    A template may end a turn with a text that is several tokens, such as `<|im_end|>` for a
    tokenizer that lacks this token. The reply ends before it.

    Args:
        tokenizer: The tokenizer of the model.
        end_texts: Texts that end a reply and are not part of it.
        on_text: Called with each piece of the text.

    Attributes:
        token_ids: The tokens so far, without the prompt.
        text: The text so far.
        has_ended: Whether one of `end_texts` was found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_texts: Sequence[str] = (),
        on_text: Callable[[str], object] = lambda _: None,
    ) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self._end_texts, self._on_text = end_texts, on_text
        self._times: list[float] = []
        self._held_back, self._is_cut = "", False
        self.token_ids: list[int] = []
        self.text, self.has_ended = "", False

    def put(self, value: Tensor) -> None:
        """Receive the prompt, int64 [1, tokens], and then one token at a time, int64 [1]."""
        if self.has_ended:
            return
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        self._times.append(time.perf_counter())
        if is_prompt:
            return
        self.token_ids += value.flatten().tolist()
        if self._end_texts and self.token_cache:
            text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
            self.has_ended |= any(end in str(text) for end in self._end_texts)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on `text` up to an end, and hold back what may be the beginning of one."""
        if self._is_cut:
            return
        text, self._held_back = self._held_back + text, ""
        ends = [place for end in self._end_texts if (place := text.find(end)) >= 0]
        if ends:
            self.has_ended = self._is_cut = True
            text = text[: min(ends)]
        elif not stream_end:
            size = max((_overlap(text, end) for end in self._end_texts), default=0)
            text, self._held_back = text[: len(text) - size], text[len(text) - size :]
        if text:
            self.text += text
            self._on_text(text)

    @property
    def prefill_seconds(self) -> float:
        """Time from the prompt to the first token."""
        return self._times[1] - self._times[0] if len(self._times) > 1 else 0.0

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the last one."""
        return self._times[-1] - self._times[1] if len(self._times) > 2 else 0.0


class EndOfReply(StoppingCriteria):
    """Ends a generation when its streamer has found the end of the reply."""

    def __init__(self, streamer: ReplyStreamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Return whether each text has ended, bool [texts]."""
        # transformers asks before it passes the newest token on: it is found one token later.
        return torch.full((len(input_ids),), self._streamer.has_ended, device=input_ids.device)


def _overlap(text: str, end: str) -> int:
    """Return the number of characters at the end of `text` with which `end` begins."""
    sizes = range(min(len(text), len(end) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(end[:size])), 0)
