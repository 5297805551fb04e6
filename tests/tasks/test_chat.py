"""A chat keeps its turns, survives mistakes, and is kept when it ends."""

import logging
from dataclasses import dataclass, field

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.generation.generator import Generation
from hqqtrain.tasks.chat import TerminalChat
from hqqtrain.tasks.replies import Replies
from hqqtrain.tracking.console import Console


@dataclass
class _Prompts:
    is_chat: bool = True

    def messages(self, messages):
        return list(messages)


@dataclass
class _Generator:
    """Answers with the number of messages, and raises the errors that a message asks for."""

    prompts: _Prompts = field(default_factory=_Prompts)
    seen: list = field(default_factory=list)

    def generate(self, prompt, on_text):
        self.seen.append(prompt if isinstance(prompt, str) else [m["content"] for m in prompt])
        last = self.seen[-1] if isinstance(prompt, str) else self.seen[-1][-1]
        if last == "long":
            raise UserError("the prompt has 600 tokens.")
        if last == "stop at once":
            raise KeyboardInterrupt
        on_text("re")
        if last == "stop":
            raise KeyboardInterrupt
        on_text("ply")
        return Generation("reply", [1, 2], 3, last != "cut", 1.0, 1.0)


def _chat(monkeypatch, *lines: str, is_chat: bool = True) -> tuple[_Generator, list]:
    given = iter([*lines])

    def read(_: str = "") -> str:
        line = next(given, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    generator, replies = _Generator(_Prompts(is_chat)), Replies()
    kept: list = []
    monkeypatch.setattr(replies, "keep", kept.append)
    TerminalChat(generator, Console(), replies).run()  # type: ignore[arg-type]
    return generator, kept


def test_turns_add_up_until_a_reset(monkeypatch, capsys):
    generator, kept = _chat(monkeypatch, "a", " b ", "", "/reset", "c")
    assert generator.seen == [["a"], ["a", "reply", "b"], ["c"]]
    assert [len(row["messages"]) for row in kept] == [4, 2]
    assert capsys.readouterr().out == "reply\n" * 3


def test_a_reply_that_was_stopped_is_part_of_the_chat(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        generator, _ = _chat(monkeypatch, "stop", "stop at once", "cut", "b")
    assert generator.seen[1:] == [
        ["stop", "re", "stop at once"], ["stop", "re", "cut"],
        ["stop", "re", "cut", "reply", "b"],
    ]  # fmt: skip
    assert "(the reply was cut off)" in caplog.text
    assert "cut off at generate.max_new_tokens" in caplog.text


def test_mistakes_and_commands_do_not_end_a_chat(monkeypatch, caplog):
    words = ("long", "/help", "/unknown", "/etc and more", KeyboardInterrupt, "/exit", "never")
    with caplog.at_level(logging.INFO):
        generator, _ = _chat(monkeypatch, *words)  # type: ignore[arg-type]
    assert generator.seen == [["long"], ["/etc and more"]]
    assert "the prompt has 600 tokens. /reset begins a new chat." in caplog.text
    assert caplog.text.count("/reset begins a new chat, /exit") == 3
    assert "/exit or Ctrl-D ends the chat" in caplog.text


def test_without_a_chat_template_each_text_is_continued_by_itself(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        generator, kept = _chat(monkeypatch, "a", "b", is_chat=False)
    assert generator.seen == ["a", "b"]
    assert kept[0] == {"prompt": "a", "completion": "reply"}
    assert "no chat template" in caplog.text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_no_control_characters(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    Console().stream_text("a\x1b[2Jb\tc\n")
    assert capsys.readouterr().out == ("a\\x1b[2Jb\tc\n" if is_terminal else "a\x1b[2Jb\tc\n")
