"""A reply is passed on in pieces that add up to it, and ends before the text that ends a turn."""

import pytest
import torch

from hqqtrain.generation.streamer import EndOfReply, ReplyStreamer
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer

TEXTS = (
    "def f(x):\n    return x + 1\n", "one <|im_end", "a<|b <|im_x", "x",
    "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} ok",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


def _stream(tokenizer, text: str, *ends: str) -> tuple[ReplyStreamer, list[str]]:
    pieces: list[str] = []
    streamer = ReplyStreamer(tokenizer, ends, pieces.append)
    streamer.put(torch.tensor([[5, 6, 7]]))
    for token in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return streamer, pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ends", [(), ("<|im_end|>",)])
def test_the_pieces_add_up_to_the_text(tokenizer, text, ends):
    streamer, pieces = _stream(tokenizer, text, *ends)
    assert "".join(pieces) == streamer.text == text
    assert streamer.token_ids == tokenizer(text)["input_ids"]
    assert not streamer.has_ended


@pytest.mark.parametrize("before", ["", "It is 4.", "It is 4. ", "Two\nlines\n"])
@pytest.mark.parametrize("after", ["", "\n<|im_start|>user\nAnd 5?", " more words"])
def test_a_reply_ends_before_the_text_that_ends_a_turn(tokenizer, before, after):
    streamer, pieces = _stream(tokenizer, f"{before}<|im_end|>{after}", "<|im_end|>", "</s>")
    assert "".join(pieces) == streamer.text == before
    assert streamer.has_ended
    whole = tokenizer.decode(streamer.token_ids)
    assert whole == f"{before}<|im_end|>"  # later tokens are not looked at
    assert EndOfReply(streamer)(torch.zeros(1, 9), torch.zeros(1, 4)).tolist() == [True]


def test_tokens_that_end_a_text_are_not_part_of_it(tokenizer):
    streamer, _ = _stream(tokenizer, "x<|endoftext|>")
    assert streamer.text == "x"
    assert not EndOfReply(streamer)(torch.zeros(1, 9), torch.zeros(1, 4)).any()


def test_both_phases_are_timed(tokenizer):
    streamer, _ = _stream(tokenizer, "one two three")
    assert streamer.prefill_seconds > 0
    assert streamer.decode_seconds > 0
    single, _ = _stream(tokenizer, "x")
    assert single.decode_seconds == 0
    assert ReplyStreamer(tokenizer).prefill_seconds == 0
