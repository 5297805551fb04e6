"""Files of text in every encoding, compression and with every line ending."""

import bz2
import codecs
import gzip
from pathlib import Path

import pyarrow
import pytest

from hqqtrain.data import text_files
from hqqtrain.data.text_files import UnreadableError, read_lines, read_text, with_newlines

TEXT = "first é\n\nthird 😀\n"
ENCODINGS = {
    "utf-8": TEXT.encode(),
    "mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16-be": TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
}


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_and_line_ending_is_the_same_text(tmp_path: Path, encoding, ending):
    file = tmp_path / "a.txt"
    content = ENCODINGS[encoding]
    name = {"mark": "utf-8-sig"}.get(encoding, encoding)
    file.write_bytes(content.decode(name).replace("\n", ending).encode(name))
    assert read_text(file) == TEXT
    lines = [(number, line.decode().rstrip("\r\n")) for number, line in read_lines(file)]
    assert lines == [(1, "first é"), (2, ""), (3, "third 😀")]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".ZST", zstd)]
)
def test_a_compressed_file_is_read(tmp_path: Path, suffix: str, compress, monkeypatch):
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(compress(TEXT.encode()))
    assert read_text(file) == TEXT
    assert b"".join(line for _, line in read_lines(file)) == TEXT.encode()
    monkeypatch.setattr(text_files, "MAX_DECOMPRESSED_BYTES", 8)
    with pytest.raises(UnreadableError, match="when decompressed"):
        read_text(file)


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_bytes(b"good\n\xff\xfe\xfd")
    with pytest.raises(UnreadableError, match="not UTF-8 text, byte 5 is 0xff"):
        read_text(file)
    file.write_bytes(b"x" * 100)
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 64)
    with pytest.raises(UnreadableError, match="line 1: longer than"):
        list(read_lines(file))


def test_line_endings():
    assert with_newlines("a\r\nb\rc\n\r") == "a\nb\nc\n\n"
