"""Parquet and Arrow files: the needed columns of every row, without nulls that Arrow has added."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.data.readers import FileRows

CALL = {"name": "f", "arguments": {"a": 1}}
ROWS = [
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "calls": [CALL]}]},
    {"messages": [{"role": "a", "content": None, "calls": [{"name": "g", "arguments": {"b": 2}}]}]},
    {"messages": None},
] * 200  # fmt: skip
EXPECTED = json.loads(json.dumps(ROWS).replace('"content": null, ', ""))


def save(path, table: pa.Table, kind: str) -> None:
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=400)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)


def rows_of(path, kind: str) -> FileRows:
    return FileRows([path], "parquet" if kind == "parquet" else "arrow", "data.source=x")


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_rows_of_every_kind(tmp_path, kind):
    table = pa.Table.from_pylist([{"id": i, **row} for i, row in enumerate(ROWS)])
    save(tmp_path / "a", table, kind)
    rows = rows_of(tmp_path / "a", kind)
    found = list(rows.read(["messages", "other"]))
    assert [row for _, row in found] == EXPECTED
    assert [found[0][0], found[-1][0]] == [f"{tmp_path}/a, row 1", f"{tmp_path}/a, row 600"]
    assert rows.column_names() == ["id", "messages"]
    assert rows.head(["id"]) == [{"id": i} for i in range(100)]
    assert list(rows.read(["other"]))[599] == (f"{tmp_path}/a, row 600", {})


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_damaged_files_and_other_columns_are_named(tmp_path, kind):
    def refusal(content: bytes, *columns: str, text: str | None = None) -> str:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(UserError) as caught:
            list(rows_of(tmp_path / "a", kind).read(columns, text))
        return str(caught.value)

    table = pa.table([[["x"]] * 600, range(600), range(600)], names=["text", "twice", "twice"])
    save(tmp_path / "whole", table, kind)
    whole = (tmp_path / "whole").read_bytes()
    sound = "not a sound parquet file" if kind == "parquet" else "not a sound Arrow file"
    for content in (whole[: len(whole) // 2], b"none", b"ARROW1"):
        assert f"data.source=x: cannot read {tmp_path}/a: {sound}" in refusal(content, "text")
    assert "a: has several columns 'twice'" in refusal(whole, "twice")
    assert "a: data.text_field=text contains list<" in refusal(whole, "text", text="text")
