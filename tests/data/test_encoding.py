"""Tokens of every kind of example, and the values of data.loss_on that each has."""

import numpy as np
import pytest
from chat_examples import CHAT, COMPLETION, PAIR, TOKENS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig
from hqqtrain.data import encoding
from hqqtrain.data.chat.library import chat_template_source
from hqqtrain.data.encoding import encode_examples
from hqqtrain.data.examples import Conversation
from hqqtrain.models.source import TINY_FOLDER


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


def trained(tokenizer, example, **data) -> str:
    """Return the text of the trained tokens of an example."""
    ((ids, targets),) = encode_examples([example], tokenizer, DataConfig(**data))
    assert ids.dtype == np.int32
    assert targets.dtype == bool
    assert not targets[:1].any()
    return tokenizer.decode(ids[targets])


@pytest.mark.parametrize(
    ("example", "loss_on", "expected"),
    [
        (CHAT, "auto", "This one.<|im_end|>That one.<|im_end|>"),
        (CHAT, "assistant", "This one.<|im_end|>That one.<|im_end|>"),
        (CHAT, "last", "That one.<|im_end|>"),
        (PAIR, "auto", "That one.<|im_end|>"),
        (PAIR, "completion", "That one.<|im_end|>"),
        (PAIR, "assistant", "This one.<|im_end|>That one.<|im_end|>"),
        (COMPLETION, "auto", "\n    return a + b<eos>"),
        (COMPLETION, "completion", "\n    return a + b<eos>"),
    ],
)
def test_what_is_trained(tokenizer, example, loss_on: str, expected: str):
    text = trained(tokenizer, example, chat_template="chatml", loss_on=loss_on)
    assert text == expected.replace("<eos>", tokenizer.eos_token)


def test_markers_that_are_no_tokens_are_named_once(tokenizer, caplog):
    encoding._log_once.cache_clear()
    for template in ("chatml", "chatml", "plain"):
        trained(tokenizer, CHAT, chat_template=template)
    (message,) = [r.getMessage() for r in caplog.records if "markers" in r.getMessage()]
    assert message.startswith("<|im_start|>, <|im_end|>: the tokenizer does not have")
    assert "data.add_tokens=auto" in message


def test_completions_that_bypass_the_template_of_the_model_are_mentioned_once(tokenizer, caplog):
    caplog.set_level("INFO")
    encoding._log_once.cache_clear()
    assert tokenizer.chat_template is None
    trained(tokenizer, COMPLETION)
    assert caplog.messages == []
    instruct = AutoTokenizer.from_pretrained(TINY_FOLDER)
    instruct.chat_template = chat_template_source("chatml")
    trained(instruct, PAIR)
    trained(instruct, CHAT)
    assert [text for text in caplog.messages if "without the chat template" in text] == []
    trained(instruct, COMPLETION)
    trained(instruct, COMPLETION)
    (message,) = [text for text in caplog.messages if "without the chat template" in text]
    assert "to use it, write rows of messages (data.format=chat)" in message


@pytest.mark.parametrize("example", ["plain text", CHAT, PAIR, COMPLETION])
def test_all_is_every_token_but_the_first(tokenizer, example):
    data = DataConfig(chat_template="chatml", loss_on="all")
    ((_, targets),) = encode_examples([example], tokenizer, data)
    assert targets.tolist() == [False] + [True] * (len(targets) - 1)


def test_tokens_bring_their_labels(tokenizer):
    ((ids, targets),) = encode_examples([TOKENS], tokenizer, DataConfig())
    assert ids.tolist() == [5, 6, 7, 8]
    assert targets.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("example", "loss_on", "allowed"),
    [
        ("text", "assistant", "auto, all"),
        (CHAT, "completion", "auto, assistant, last, all"),
        (COMPLETION, "last", "auto, completion, all"),
        (TOKENS, "all", "auto"),
    ],
)
def test_a_value_that_the_examples_do_not_have_is_refused(tokenizer, example, loss_on, allowed):
    with pytest.raises(UserError, match=rf"data.loss_on={loss_on}: .*allowed are {allowed}\."):
        list(encode_examples([example], tokenizer, DataConfig(loss_on=loss_on)))


def test_a_completion_begins_with_the_tokens_that_a_text_begins_with(tokenizer, monkeypatch):
    """As a prompt at inference: BOS, where the tokenizer adds one, but no EOS before the answer."""

    class AddsBos:
        is_fast, eos_token_id, chat_template = True, tokenizer.eos_token_id, None

        def __call__(self, text, add_special_tokens=True, **options):
            encoding = dict(tokenizer(text, add_special_tokens=False, **options))
            if add_special_tokens:
                encoding["input_ids"] = [1, *encoding["input_ids"], 2]
            return encoding

    ((ids, targets),) = encode_examples([COMPLETION], AddsBos(), DataConfig())
    prompt = tokenizer(COMPLETION.prompt, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt) + 1].tolist() == [1, *prompt]
    assert ids[-1] == tokenizer.eos_token_id
    assert targets.tolist() == [False] * (len(prompt) + 1) + [True] * (len(ids) - len(prompt) - 1)


def test_an_example_that_cannot_be_rendered_is_named(tokenizer):
    odd = Conversation(({"role": "user", "content": "Q"}, {"role": "critic", "content": "A"}))
    data = DataConfig(chat_template="gemma")
    with pytest.raises(UserError, match=r"data.source=x, example 2: .*system, user and assistant"):
        list(encode_examples([CHAT, odd], tokenizer, data, "data.source=x"))


def test_examples_that_are_refused_are_left_out_as_bad_rows(tokenizer, caplog):
    odd = Conversation(({"role": "user", "content": "Q"}, {"role": "critic", "content": "A"}))
    data = DataConfig(chat_template="gemma", max_bad_rows=1)
    ((ids, _),) = encode_examples([odd, CHAT], tokenizer, data)
    assert ids.tolist() == next(encode_examples([CHAT], tokenizer, data))[0].tolist()
    assert "left out (data.max_bad_rows=1): data.source, example 1: " in caplog.text
    with pytest.raises(UserError, match=r"example 3: .* Set data\.max_bad_rows above 1"):
        list(encode_examples([odd, CHAT, odd], tokenizer, data))


def test_an_example_that_is_repeated_is_one_bad_row(tokenizer, caplog):
    """As with `repeats` or `weight` of its source."""
    messages = ({"role": "user", "content": "Q"}, {"role": "critic", "content": "A"})
    odd, other = (Conversation(messages, place=f"a.jsonl, line {line}") for line in (3, 4))
    data = DataConfig(chat_template="gemma", max_bad_rows=1)
    assert len(list(encode_examples([odd, CHAT, odd, CHAT, odd], tokenizer, data))) == 2
    assert caplog.text.count("line 3") == 1
    with pytest.raises(UserError, match="line 4"):
        list(encode_examples([odd, CHAT, odd, other], tokenizer, data))


def test_the_number_of_refused_examples_is_logged_if_not_all_are_named(tokenizer, caplog):
    messages = ({"role": "user", "content": "Q"}, {"role": "critic", "content": "A"})
    odd = [Conversation(messages, place=f"a.jsonl, line {line}") for line in range(7)]
    data = DataConfig(chat_template="gemma", max_bad_rows=9)
    list(encode_examples([CHAT, *odd[:5]], tokenizer, data))
    assert len(caplog.messages) == 5
    list(encode_examples([CHAT, *odd, *odd], tokenizer, data))
    assert "data.source: 7 examples in all are left out (data.max_bad_rows=9)" in caplog.text
    assert len(caplog.messages) == 5 + 5 + 1


def test_a_tokenizer_without_offsets_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"data.loss_on: Slow .*tokenizer.json"):
        list(encode_examples([COMPLETION], Slow(), DataConfig()))


def test_no_examples_are_no_tokens(tokenizer):
    assert list(encode_examples([], tokenizer, DataConfig())) == []


def test_kinds_of_several_sources_are_encoded_as_each_alone(tokenizer):
    data = DataConfig(chat_template="chatml")
    mixed = ["a text", "another", CHAT, TOKENS, COMPLETION, PAIR, CHAT, "a text"]
    together = list(encode_examples(mixed, tokenizer, data))
    alone = [next(encode_examples([example], tokenizer, data)) for example in mixed]
    assert len(together) == len(mixed)
    for (ids, targets), (expected_ids, expected_targets) in zip(together, alone, strict=True):
        assert ids.tolist() == expected_ids.tolist()
        assert targets.tolist() == expected_targets.tolist()
