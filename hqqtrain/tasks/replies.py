"""Keep the replies of task=generate: their speed for the log, and their text for a file."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write
from hqqtrain.common.text import count
from hqqtrain.generation.generator import Generation

logger = logging.getLogger(__name__)


class Replies:
    """The replies so far.

    Args:
        output: The value of `generate.output`.

    Raises:
        UserError: The file exists already, or cannot be written.
    """

    def __init__(self, output: str | None = None) -> None:
        self._file = _new_file(output) if output else None
        self._rows: list[dict[str, Any]] = []
        self._generations: list[Generation] = []

    def count_tokens(self, generation: Generation) -> None:
        """Add a reply to the figures of `describe_speed`."""
        self._generations.append(generation)

    def keep(self, row: dict[str, Any]) -> None:
        """Keep a row for the file: a chat with its replies, or a prompt with its completion."""
        self._rows.append(row)

    def write(self) -> None:
        """Write the rows, if there is a file for them.

        Raises:
            UserError: The file cannot be written.
        """
        if self._file and self._rows:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
            try:
                atomic_write(self._file, "".join(lines).encode(errors="backslashreplace"))
            except OSError as error:
                raise UserError(
                    f"generate.output={self._file}: cannot be written ({error.strerror}); name a "
                    "file in another folder."
                ) from error
            logger.info("wrote %s to %s", count(len(self._rows), "row"), self._file)

    def describe_speed(self) -> str:
        """Return the tokens per second of both phases; an empty text without replies.

        The first token of a reply belongs to the prefill.
        """
        read = sum(each.prompt_tokens for each in self._generations)
        made = sum(len(each.token_ids) - 1 for each in self._generations)
        prefill = sum(each.prefill_seconds for each in self._generations)
        decode = sum(each.decode_seconds for each in self._generations)
        phases = ((read, prefill, "prefill", "prompt token"), (made, decode, "decode", "token"))
        return "; ".join(
            f"{name}: {count(tokens, noun)} in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s"
            for tokens, seconds, name, noun in phases
            if seconds > 0
        )


def _new_file(name: str) -> Path:
    """Return the path of `generate.output`, after a look at its folder."""
    file = Path(name).expanduser()
    if os.path.lexists(file):
        raise UserError(f"generate.output={name}: exists already; choose another name.")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"generate.output={name}: {file.parent} is not a folder to write to.")
    return file
