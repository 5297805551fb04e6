"""One source of each kind, opened: its parts, its format, and the names of the hub."""

import json
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig
from hqqtrain.data.examples import Completion, Conversation
from hqqtrain.data.single_source import open_source

ROWS = {
    "chat": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "completion": {"prompt": "Q", "completion": "A"},
    "text": {"text": "Q A"},
}


def opened(folder: Path, row: dict, **data):
    file = folder / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return open_source(str(file), DataConfig(source=str(file), **data), "data.source")


@pytest.mark.parametrize(
    ("name", "kind"), [("chat", Conversation), ("completion", Completion), ("text", str)]
)
def test_the_columns_tell_the_format(tmp_path: Path, name: str, kind: type):
    source = opened(tmp_path, ROWS[name])
    (example,) = source.train
    assert isinstance(example, kind)
    assert source.held_out is None
    assert list(source.train) == [example], "it may be read again"


def test_a_row_has_its_place(tmp_path: Path):
    (example,) = opened(tmp_path, ROWS["chat"]).train
    assert isinstance(example, Conversation)
    assert example.place.endswith("a.jsonl, line 1")


def test_the_format_may_be_given(tmp_path: Path):
    row = ROWS["chat"] | {"text": "plain"}
    assert list(opened(tmp_path, row, format="text").train) == ["plain"]
    with pytest.raises(UserError, match=r"data\.format=completion"):
        list(opened(tmp_path, ROWS["chat"], format="completion").train)


@pytest.mark.parametrize("name", ["python_stdlib", "python_stdlib_chat"])
def test_built_in_sources_have_two_parts(name: str):
    source = open_source(name, DataConfig(), "data.source")
    train, held_out = (list(part or []) for part in (source.train, source.held_out))
    assert len(train) > len(held_out) > 0


def test_a_path_that_does_not_exist_is_no_name_of_the_hub(tmp_path: Path):
    for name in (f"{tmp_path}/missing.jsonl", "./missing", "missing.parquet"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_source(name, DataConfig(), "data.source")
