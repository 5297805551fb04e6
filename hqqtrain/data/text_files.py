"""Open files of text: decompressed, in any Unicode encoding, with any line ending."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow

MAX_ROW_BYTES = 1 << 28
"""Longest line of a file of rows. A longer one is no row, and would exhaust the memory."""

MAX_DECOMPRESSED_BYTES = 1 << 30
"""Most bytes of a compressed text, or of a compressed JSON array, which are read at once."""

COMPRESSIONS = (".gz", ".bz2", ".zst")
"""Extensions of compressed files, which follow the extension of a format, as in `a.jsonl.gz`."""

_BLOCK_BYTES = 1 << 24


class UnreadableError(ValueError):
    """A file cannot be read. The message continues the name of the file."""


def open_file(file: Path) -> io.BufferedReader:
    """Open a file, which is decompressed if its extension says so."""
    if file.suffix.lower() not in COMPRESSIONS:
        return file.open("rb")
    compression = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}[file.suffix.lower()]
    return io.BufferedReader(pyarrow.input_stream(str(file), compression=compression))


def read_all(file: Path) -> bytearray:
    """Return the content of a file. A few compressed bytes may stand for more than the memory.

    Raises:
        UnreadableError: The content is compressed and too large.
    """
    content = bytearray()
    with open_file(file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            content += block
            if len(content) > MAX_DECOMPRESSED_BYTES and file.suffix.lower() in COMPRESSIONS:
                raise UnreadableError(
                    f": more than {MAX_DECOMPRESSED_BYTES >> 20} MiB when decompressed, which are "
                    "read at once; split it into several files, or use JSON Lines."
                )
    return content


def read_text(file: Path) -> str:
    """Return the text of a file, with every line ending as a newline.

    Raises:
        UnreadableError: The file is no text in a Unicode encoding.
    """
    content = read_all(file)
    encoding = json.detect_encoding(content[:4])  # by the byte order mark, or by bytes of 0
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        # The name of the encoding that was expected: "UTF-8 text" also if there is a mark.
        expected = encoding.upper().removesuffix("-SIG")
        raise UnreadableError(
            f": not {expected} text, byte {error.start} is {error.object[error.start]:#04x}."
        ) from error
    return with_newlines(text)


def with_newlines(text: str) -> str:
    """Return a text with every line ending as a newline."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its ending) in UTF-8, for any line ending and encoding.

    Raises:
        UnreadableError: The encoding is wrong, or a line is longer than `MAX_ROW_BYTES`.
    """
    with open_file(file) as stream:
        start = bytes(stream.peek(4)[:4])
        encoding = json.detect_encoding(start)
        if not encoding.startswith("utf-8"):
            try:
                content = read_all(file).decode(encoding).encode()
            except UnicodeError as error:
                raise UnreadableError(f": not {encoding.upper()} text: {error}.") from error
            yield from enumerate(content.splitlines(keepends=True), start=1)
            return
        if encoding == "utf-8-sig":
            stream.read(3)  # the byte order mark
        number = 0
        while block := stream.readline(MAX_ROW_BYTES):
            if len(block) == MAX_ROW_BYTES:
                raise UnreadableError(
                    f", line {number + 1}: longer than {MAX_ROW_BYTES >> 20} MiB; a row of a file "
                    "of rows is one line."
                )
            for line in block.splitlines(keepends=True):  # several lines, if they end with CR
                number += 1
                yield number, line
