"""Readers: rows of every type of file, whatever the columns, encodings and line endings are."""

import bz2
import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.data import text_files
from hqqtrain.data.formats.text import text_format
from hqqtrain.data.readers import FileRows
from hqqtrain.data.row_examples import RowExamples


def texts_of(*files: Path, format: str = "jsonl", field: str = "text") -> RowExamples:
    rows = FileRows(list(files), format, "data.source=x")
    return RowExamples(rows, text_format(field), "data.source=x")


def read(*files: Path, format: str = "jsonl", field: str = "text") -> list[str]:
    return list(texts_of(*files, format=format, field=field))


def refusal(*files: Path, format: str = "jsonl", field: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        read(*files, format=format, field=field)
    return str(caught.value)


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def rows(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "others",
    [
        ({"x": 1}, {"x": "y"}), ({"x": None}, {"x": {"k": 1}}), ({"x": []}, {"x": [{"y": 1}]}),
        ({}, {"x": 1.5}), ({"x": "2024-01-01"}, {"x": 7}), ({"x": {"a": 1}}, {"x": {"b": "c"}}),
        ({"x": 1}, {"x": 10**30}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_one_file", [True, False])
def test_other_columns_do_not_matter(tmp_path, others, in_one_file):
    lines = [rows({"text": f"text {i}", **other}) for i, other in enumerate(others)]
    if in_one_file:
        files = [write(tmp_path / "a.jsonl", "".join(lines))]
    else:
        files = [write(tmp_path / f"{i}.jsonl", line) for i, line in enumerate(lines)]
    assert read(*files) == ["text 0", "text 1"]


def test_a_column_changes_its_type_late_in_a_file(tmp_path):
    many = rows({"text": "long " * 20, "x": 1}) * 20_000
    file = write(tmp_path / "a.jsonl", many + rows({"text": "last", "x": "y"}))
    assert read(file)[-1] == "last"


def test_text_that_looks_like_a_date_or_a_number_is_text(tmp_path):
    texts = ["2024-01-01", "2024-02-02T10:00:00Z", "17", "1.5", "true", "null", "NaN"]
    assert read(write(tmp_path / "a.jsonl", rows(*({"text": t} for t in texts)))) == texts


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (2, "a number"), (2.5, "a number"), (True, "a boolean"), (["a"], "a list"),
        ({"a": 1}, "an object"),
        ([{"role": "user", "content": "hi"}], "a list"),
    ],
)  # fmt: skip
def test_a_row_without_text_is_named(tmp_path, value, kind):
    good = write(tmp_path / "a.jsonl", rows({"text": "fine"}))
    bad = write(tmp_path / "b.jsonl", rows({"text": "fine"}, {}, {"text": value}))
    assert f"b.jsonl, line 3: data.text_field=text is {kind}, not text: " in refusal(good, bad)
    array = write(tmp_path / "c.json", json.dumps([{"text": "fine"}, {"text": value}]))
    assert f"c.json, item 2: data.text_field=text is {kind}, not text: " in refusal(array)


def test_rows_whose_text_is_missing_or_null_are_skipped_with_a_warning(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", rows({"text": None}, {"x": 1}, {"text": "a"}, {"text": ""}))
    texts = texts_of(file)
    assert list(texts) == list(texts) == ["a", ""]
    assert caplog.text.count("2 of 4 rows have no text in 'text' and are skipped") == 1
    assert "a.jsonl, line 1" in caplog.text


def test_a_field_that_does_not_exist_lists_those_that_do(tmp_path):
    table = [{"prompt": "x", "texts": "y"}]
    files = {"jsonl": write(tmp_path / "a.jsonl", rows(*table)), "parquet": tmp_path / "a.parquet"}
    pq.write_table(pa.Table.from_pylist(table), files["parquet"])
    for format, file in files.items():
        message = refusal(file, format=format)
        assert "data.text_field=text: data.source=x has no such column" in message
        assert "rename the columns, such as question to prompt" in message
        assert "it has prompt, texts. Did you mean 'texts'?" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("compress", [None, gzip.compress, bz2.compress])
def test_encodings_and_line_endings(tmp_path, encoding, end, compress):
    suffix = {gzip.compress: ".gz", bz2.compress: ".bz2"}.get(compress, "")
    for name, content, format, expected in (
        ("a.jsonl", f'{{"text": "Grüße\u2028"}}{end}{end}{{"text": "zwei"}}', "jsonl",
         ["Grüße\u2028", "zwei"]),
        ("a.json", f'[{end}{{"text": "Grüße"}},{end}{{"text": "zwei"}}]', "jsonl",
         ["Grüße", "zwei"]),
        ("b.json", f'{{{end}"text": "Grüße"{end}}}', "jsonl", ["Grüße"]),
        ("a.txt", f"Grüße{end}zwei{end}", "text", ["Grüße\nzwei\n"]),
    ):  # fmt: skip
        data = content.encode(encoding)
        file = write(tmp_path / (name + suffix), compress(data) if compress else data)
        assert read(file, format=format) == expected


def test_zstandard(tmp_path):
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(rows({"text": "x"}).encode())
    assert read(tmp_path / "a.jsonl.zst") == ["x"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}\n{"text": "b"', "line 2: not valid JSON: Expecting ',' delimiter, column"),
        ('{"text": "a"}\n["b"]', 'line 2: an object such as {"text": ...} is needed, not ["b"]'),
        (b'{"text": "a"}\n{"text": "\xff"}', "line 2: not UTF-8 text, byte 10 is 0xff"),
        ('{"text": "a"}\n{"x": ' + "[" * 100_000, "line 2: too deeply nested JSON"),
        ('{"text": "a"}\n{"x": ' + "1" * 10_000 + "}", "line 2: not valid JSON: Exceeds the limit"),
        ('{"text": "a"}\n{"text": "\\ud800"}', "line 2: data.text_field=text has '\\ud800'"),
        ('[{"text": "a"}, {"text": }]', "a.jsonl: not valid JSON: Expecting value, line 1, column"),
        (b"\xff\xfe{", "not UTF-16 text"),
        ("a,b\n1,2\n", "line 1: not valid JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', 'line 1: an object such as {"text": ...} is needed'),
        *((empty, "no row with a field") for empty in ("\n \n", "[]", "{}")),
    ],
)  # fmt: skip
def test_bad_json_is_named_with_its_line(tmp_path, content, reason):
    assert reason in refusal(write(tmp_path / "a.jsonl", content))


def test_a_line_that_is_too_long_for_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1 << 20)
    content = rows({"text": "a"}) + '{"text": "' + "x" * (1 << 20)
    assert "a.jsonl, line 2: longer than 1 MiB" in refusal(write(tmp_path / "a.jsonl", content))
    bomb = gzip.compress(b"x" * (1 << 22))
    assert "line 1: longer than 1 MiB" in refusal(write(tmp_path / "a.jsonl.gz", bomb))


def test_damaged_compressed_files_are_named(tmp_path):
    whole = gzip.compress(rows({"text": "a"}).encode())
    for content in (whole[:-12], b"no gzip at all"):
        assert "cannot read" in refusal(write(tmp_path / "a.jsonl.gz", content))
        assert "a.txt.gz" in refusal(write(tmp_path / "a.txt.gz", content), format="text")


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_text_of_every_type_and_null(tmp_path, type_):
    values = ["a", None, "", "b"] * 200
    pq.write_table(pa.table({"x": range(800), "text": pa.array(values, type_)}), tmp_path / "a")
    assert read(tmp_path / "a", format="parquet") == ["a", "", "b"] * 200


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([["a"]]), "contains list<"), (pa.array([b"a"]), "contains binary, not text"),
        (pa.array([], pa.string()), "every row of 'text' is empty"),
        (pa.array([None, None], pa.string()), "every row of 'text' is empty"),
        (pa.array([None, None]), "every row of 'text' is empty"),
    ],
)  # fmt: skip
def test_parquet_without_text_is_refused(tmp_path, column, reason):
    pq.write_table(pa.table({"text": column}), tmp_path / "a")
    assert reason in refusal(tmp_path / "a", format="parquet")


def test_damaged_parquet_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 1000, "b"] * 100}), tmp_path / "good")
    content = (tmp_path / "good").read_bytes()
    assert "bad: not a sound parquet" in refusal(write(tmp_path / "bad", b"no"), format="parquet")
    half = write(tmp_path / "half", content[: len(content) // 2])
    assert "half: not a sound parquet" in refusal(half, format="parquet")
    invalid = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "bytes")
    assert "not UTF-8" in refusal(tmp_path / "bytes", format="parquet")


@pytest.mark.parametrize(("suffix", "compress"), [(".GZ", gzip.compress), (".Bz2", bz2.compress)])
def test_compressed_files_in_upper_case(tmp_path, suffix, compress):
    (tmp_path / f"a.TXT{suffix}").write_bytes(compress(b"x"))
    assert read(tmp_path / f"a.TXT{suffix}", format="text") == ["x"]


def test_several_parquet_columns_of_the_name_are_refused(tmp_path):
    pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has several columns data\.text_field=text"):
        read(tmp_path / "a.parquet", format="parquet")


@pytest.mark.parametrize(
    "content", [b"a word " * 99, b"[" + b" " * 700 + b"]", b"\xff\xfe" + b"a\0" * 99]
)
def test_a_compressed_file_is_not_read_beyond_a_limit(tmp_path, monkeypatch, content):
    monkeypatch.setattr(text_files, "MAX_DECOMPRESSED_BYTES", 100)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 64)
    format = "jsonl" if content.startswith((b"[", b"\xff")) else "text"
    file = write(tmp_path / "a.txt.gz", gzip.compress(content))
    assert "a.txt.gz: more than 0 MiB when decompressed" in refusal(file, format=format)
    read(write(tmp_path / "b.txt", b"a word " * 99), format="text")


CSV_ROWS = [
    {"text": "plain", "id": "1"}, {"text": 'a "quote", and a comma', "id": "2"},
    {"text": "two\nlines", "id": "3"}, {"text": "Grüße \u4f60", "id": ""},
]  # fmt: skip


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_as_programs_write_it(tmp_path, delimiter, end, encoding):
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, ["id", "text"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows({**row, "text": row["text"].replace("\n", end)} for row in CSV_ROWS)
    for name in ("a.csv", "a.csv.gz"):
        content = stream.getvalue().encode(encoding)
        file = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
        rows = FileRows([file], "csv", "data.source=x")
        assert [row for _, row in rows.read(["text"])] == CSV_ROWS
        assert rows.column_names() == ["id", "text"]
    assert read(file, format="csv") == [row["text"] for row in CSV_ROWS]


def test_the_place_of_a_csv_row_is_the_line_where_it_begins(tmp_path):
    file = write(tmp_path / "a.csv", 'text,n\n"one\ntwo",1\n\nthree,2\n')
    places = [place for place, _ in FileRows([file], "csv", "x").read(None)]
    assert places == [f"{file}, line 2", f"{file}, line 5"]


def test_a_tab_separates_a_tsv_with_commas_in_its_header(tmp_path):
    file = write(tmp_path / "a.tsv", "a, b, c\ttext\n1\tx,y\n")
    assert read(file, format="csv") == ["x,y"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,n\nx,1\ny\n", "a.csv, line 3: has 1 fields, but the first row names 2"),
        ("text\nx, y\n", "a.csv, line 2: has 2 fields, but the first row names 1"),
        ('text,n\nx,1\n"y,2\nz,3\n', "a.csv, line 3: no sound CSV: unexpected end of data"),
        ('text,n\n"x" y,1\n', "a.csv, line 2: no sound CSV"),
        ('"text\nx\n', "a.csv, line 1: no sound CSV"),
        ("text,text\nx,y\n", "a.csv: has several columns 'text'"),
        (b"text\nGr\xfc\n", "a.csv, line 2: not UTF-8 text, byte 2 is 0xfc"),
        ("\n\nx\n1\n", "it has x"),
        ("text\n", "every row of 'text' is empty"), ("body\nx\n", "it has body"),
    ],
)  # fmt: skip
def test_bad_csv_is_named_with_its_line(tmp_path, content, reason):
    assert reason in refusal(write(tmp_path / "a.csv", content), format="csv")


def test_rows_after_a_bad_one_can_be_read(tmp_path):
    for name, content in (
        ("jsonl", '{"text": "a"}\n{"text": \n[1]\n{"text": "b"}\n'),
        ("csv", 'text,n\na,1\n"b" c,2\nd\nb,3\n'),
    ):
        rows = list(FileRows([write(tmp_path / name, content)], name, "x").read(None))
        assert [row["text"] for _, row in rows if isinstance(row, dict)] == ["a", "b"]
        assert len(rows) == 4


def test_the_head_and_the_columns_are_those_of_the_first_rows_of_several_files(tmp_path):
    files = [write(tmp_path / "empty", ""), write(tmp_path / "a", rows({"x": 1}) * 500),
             write(tmp_path / "b", rows({"y": 2}))]  # fmt: skip
    found = FileRows(files, "jsonl", "data.source=x")
    assert found.column_names() == ["x", "y"]
    assert found.head(None) == [*[{"x": 1}] * 100, {"y": 2}]
    broken = FileRows([files[1], tmp_path / "none", files[2]], "jsonl", "data.source=x")
    assert broken.column_names() == ["x"]  # whoever reads the rows gets the error
