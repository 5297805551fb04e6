"""Tokens of conversations: every token is on one side of the edge of a trained part."""

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hqqtrain.data.chat.encoding import ChatEncoder
from hqqtrain.data.chat.library import chat_template_source, template_names
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.data.examples import Conversation
from hqqtrain.models.source import TINY_FOLDER

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


def conversation(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))
    )


def trained_text(tokenizer, ids: np.ndarray, targets: np.ndarray) -> list[str]:
    """Return the text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], targets.astype(int), [0]])))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    "content", ["Hi.", "\nHi", "  Hi", "Hi\n", " ", "a😀", "def f():\n    pass"]
)
def test_trained_tokens_are_the_text_of_the_turns(tokenizer, content: str):
    """With a template whose header ends with a newline, which a tokenizer joins with others."""
    encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, CHATML), "assistant")
    ids, targets = encoder.encode(conversation("Q?", content, "And?", "Bye."))
    assert trained_text(tokenizer, ids, targets) == [f"{content}<|im_end|>", "Bye.<|im_end|>"]
    text = ChatTemplate(tokenizer, CHATML).render(
        conversation("Q?", content, "And?", "Bye.").messages
    )
    assert tokenizer.decode(ids) == text


def test_the_space_that_a_token_begins_with_is_on_its_side(tokenizer):
    """The prompt ends with a space, which the tokens of most tokenizers take to the next word."""
    encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, PLAIN), "assistant")
    ids, targets = encoder.encode(conversation("Hello?", "Hello"))
    assert trained_text(tokenizer, ids, targets) == [f"Hello\n{tokenizer.eos_token}"]
    prompt = tokenizer("USER: Hello?\nASSISTANT: ", add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("content", ["Hello", "1", "- a", "(x)", "\u4f60"])
def test_the_tokens_before_an_answer_are_those_of_the_prompt(tokenizer, name: str, content: str):
    """Also where the header ends with two line endings, as in Llama 3's template."""
    template = ChatTemplate(tokenizer, chat_template_source(name))
    chat = conversation("Q?", content)
    ids, targets = ChatEncoder(tokenizer, template, "assistant").encode(chat)
    prompt = template.render(chat.messages[:1], add_generation_prompt=True)
    expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[: len(expected)].tolist() == expected
    assert targets.argmax() == len(expected)


def test_a_text_without_a_token_that_ends_the_turn_gets_eos(tokenizer):
    for template, added in ((PLAIN, True), (CHATML, False)):
        encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, template), "assistant")
        ids, targets = encoder.encode(conversation("Q?", "A."))
        assert (ids[-1] == tokenizer.eos_token_id) == added
        assert targets[-1] == added  # else the newline after <|im_end|>


@pytest.mark.parametrize(("loss_on", "count"), [("assistant", 2), ("last", 1), ("completion", 1)])
def test_the_turns_that_are_trained(tokenizer, loss_on: str, count: int):
    encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, CHATML), loss_on)
    chat = conversation("Q?", "One.", "R?", "Two.")
    chat = Conversation(chat.messages, completion_start=2 if loss_on == "completion" else None)
    parts = trained_text(tokenizer, *encoder.encode(chat))
    assert parts == ["One.<|im_end|>", "Two.<|im_end|>"][-count:]


def test_all_is_every_token_but_the_first(tokenizer):
    encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, CHATML), "all")
    ids, targets = encoder.encode(conversation("Q?", "A."))
    assert len(ids) > 5
    assert targets.tolist() == [False] + [True] * (len(ids) - 1)


def test_a_turn_that_the_row_excludes_is_not_trained(tokenizer):
    encoder = ChatEncoder(tokenizer, ChatTemplate(tokenizer, CHATML), "assistant")
    chat = conversation("Q?", "One.", "R?", "Two.")
    ids, targets = encoder.encode(Conversation(chat.messages, untrained=frozenset({1})))
    assert trained_text(tokenizer, ids, targets) == ["Two.<|im_end|>"]
