"""A chat on the terminal with the model of task=generate."""

import logging
import sys
from collections.abc import Iterator
from contextlib import suppress

from hqqtrain.common.errors import UserError
from hqqtrain.data.examples import Message
from hqqtrain.generation.generator import Generation, TextGenerator
from hqqtrain.tasks.replies import Replies
from hqqtrain.tracking.console import Console

logger = logging.getLogger(__name__)

_PROMPT = "> "

_HELP = "/reset begins a new chat, /exit or Ctrl-D ends, Ctrl-C stops a reply"
_HELP_WITHOUT_CHAT = (
    "the tokenizer has no chat template, so each text is continued by itself; /exit or Ctrl-D "
    "ends, Ctrl-C stops a text"
)


class TerminalChat:
    """A chat of several turns, or single texts to continue if there is no chat template.

    Args:
        generator: Generates the replies.
        console: Gets the replies.
        replies: Keeps them.
    """

    def __init__(self, generator: TextGenerator, console: Console, replies: Replies) -> None:
        self._generator, self._console, self._replies = generator, console, replies
        self._messages: list[Message] = []
        self._help = _HELP if generator.prompts.is_chat else _HELP_WITHOUT_CHAT

    def run(self) -> None:
        """Answer what the user types, until the user ends the chat."""
        logger.info("%s", self._help)
        try:
            for line in self._lines():
                if line in ("/exit", "/quit"):
                    return
                if line == "/reset":
                    self._reset()
                elif line == "/help" or (line.startswith("/") and " " not in line):
                    logger.info("%s", self._help)
                elif line:
                    self._answer(line)
        finally:
            self._reset()

    def _lines(self) -> Iterator[str]:
        """Yield the lines that the user types."""
        with suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit a line, and remember earlier ones
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        is_shown = sys.stdout.isatty()  # otherwise `input` would write the prompt into a pipe
        while True:
            try:
                if not is_shown:
                    sys.stderr.write(_PROMPT)
                    sys.stderr.flush()
                yield input(_PROMPT if is_shown else "").strip()
            except EOFError:
                sys.stderr.write("\n")
                return
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                logger.info("/exit or Ctrl-D ends the chat")

    def _answer(self, line: str) -> None:
        """Answer a message, or continue a text."""
        is_chat = self._generator.prompts.is_chat
        self._messages.append({"role": "user", "content": line})
        pieces: list[str] = []

        def on_text(text: str) -> None:
            pieces.append(text)
            self._console.stream_text(text)

        generation: Generation | None = None
        try:
            generation = self._generator.generate(self._messages if is_chat else line, on_text)
            self._replies.count_tokens(generation)
        except UserError as error:
            logger.error("%s%s", error, " /reset begins a new chat." if is_chat else "")
        except KeyboardInterrupt:
            pass
        if pieces:
            self._console.stream_text("\n")
        if generation is None and not pieces:  # as if the user had not asked
            self._messages.pop()
        elif is_chat:
            self._messages.append({"role": "assistant", "content": "".join(pieces)})
            if generation is None or not generation.is_complete:
                logger.info(
                    "(the reply was cut off%s)",
                    ""
                    if generation is None
                    else " at generate.max_new_tokens, or because the context is full",
                )
        else:
            self._replies.keep({"prompt": line, "completion": "".join(pieces)})
            self._messages.clear()

    def _reset(self) -> None:
        """Begin a new chat; the finished one is kept."""
        if self._messages:
            self._replies.keep({"messages": self._generator.prompts.messages(self._messages)})
        self._messages.clear()
