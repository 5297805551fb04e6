"""The prompts of task=generate: from its keys, from a file, or from standard input."""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.config.generate import GenerateConfig
from hqqtrain.data.examples import Message
from hqqtrain.data.files import format_extension
from hqqtrain.data.formats import chat
from hqqtrain.data.formats.format import check_text, first_of
from hqqtrain.data.readers import FileRows
from hqqtrain.data.rows import Row, RowError
from hqqtrain.generation.prompts import Prompt

logger = logging.getLogger(__name__)

_JSON = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt, and where it comes from, for messages."""

    content: Prompt
    place: str

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Let errors in the context name the prompt."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.place}: {error}") from error


def read_prompts(settings: GenerateConfig) -> list[PlacedPrompt] | None:
    """Return the prompts; None if a user is to type them on the terminal.

    Raises:
        UserError: The file cannot be read or has no prompts; or there are no prompts at all.
    """
    if settings.prompt is not None or settings.prompts_file is not None:
        return [*_prompts_of_keys(settings.prompt), *read_prompts_file(settings.prompts_file)]
    if sys.stdin.isatty():
        return None
    try:
        prompts = list(_prompts_of_lines("standard input", sys.stdin))
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: is not text ({error}).") from error
    if not prompts:
        raise UserError(
            "task=generate: there are no prompts. Set generate.prompt or generate.prompts_file, "
            "write them to standard input, or start the command on a terminal to chat."
        )
    return prompts


def read_prompts_file(name: str | None) -> list[PlacedPrompt]:
    """Return the prompts of `generate.prompts_file`.

    Raises:
        UserError: The file cannot be read or has no prompts.
    """
    if name is None:
        return []
    file, where = Path(name).expanduser(), f"generate.prompts_file={name}"
    is_json = format_extension(file) in _JSON
    prompts: list[PlacedPrompt] = []
    for place, row in FileRows([file], "jsonl" if is_json else "text", where).read(None):
        if isinstance(row, RowError):
            raise UserError(f"{where}: {place}: {row}")
        if not is_json:
            prompts += _prompts_of_lines(str(file), row["text"].split("\n"))
            continue
        try:
            prompts.append(PlacedPrompt(_prompt_of_row(row), place))
        except RowError as error:
            raise UserError(f"{where}: {place}: {error}") from error
    if not prompts:
        raise UserError(f"{where}: the file has no prompts; write one in every line.")
    return prompts


def _prompts_of_keys(value: Any) -> Iterator[PlacedPrompt]:
    if isinstance(value, list):
        for index, prompt in enumerate(value):
            yield PlacedPrompt(prompt, f"generate.prompt[{index}]")
    elif value is not None:
        yield PlacedPrompt(value, "generate.prompt")


def _prompts_of_lines(source: str, lines: Iterable[str]) -> Iterator[PlacedPrompt]:
    """Yield the lines that are not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield PlacedPrompt(line.rstrip("\r\n"), f"{source}, line {number}")


def _prompt_of_row(row: Row) -> Prompt:
    """Return the prompt of a row. An answer at the end of a chat is left out.

    Raises:
        RowError: The row has no prompt, or one that cannot be read.
    """
    if column := first_of(chat.MESSAGE_COLUMNS, row):
        conversation = chat.parse(row, column)
        messages: list[Message] = [*conversation.messages]
        if conversation.tools:
            raise RowError("has tools, with which task=generate cannot answer")
    elif isinstance(row.get("prompt"), list):
        messages = [*chat.parse_messages(row["prompt"], "prompt")[0]]
    elif "prompt" in row:
        return check_text(row["prompt"], "prompt")
    else:
        raise RowError(f"has neither prompt nor messages; its keys are {', '.join(row)[:100]}")
    while messages and messages[-1]["role"] == "assistant":
        del messages[-1]
    if not messages:
        raise RowError("has no message to answer")
    return messages
