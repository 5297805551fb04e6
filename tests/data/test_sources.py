"""Sources: every kind is read correctly, and every error is one message with key and file."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data import hub, sources
from hqqtrain.data.sources import load_held_out_texts, load_training_texts
from hqqtrain.data.stdlib import is_held_out, stdlib_modules

NO_EVAL = EvalConfig(source=None)
STDLIB_EVAL = EvalConfig()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(source: Path | str, **settings) -> list[str]:
    return list(load_training_texts(DataConfig(source=str(source), **settings), NO_EVAL))


def error_message(source: Path | str, **settings) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **settings)
    return str(caught.value)


def test_a_text_file_is_one_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("Grüße\n\nzwei\n", encoding="utf-8")
    assert read(file) == ["Grüße\n\nzwei\n"]
    assert read(file, text_field="body") == ["Grüße\n\nzwei\n"]


def test_a_folder_is_read_recursively_sorted_without_hidden_files(tmp_path, caplog):
    for name in ("b.py", "a.md", "sub/c.txt", ".git/d.txt", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.md", "b.py", "sub/c.txt"]
    assert "3 of 4 files" in caplog.text


def test_a_file_name_is_not_a_pattern(tmp_path):
    for name in ("a[1].txt", "a1.txt", "b*.txt", "b c?.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "a[1].txt") == ["a[1].txt"]
    assert read(tmp_path / "b*.txt") == ["b*.txt"]
    assert len(read(tmp_path)) == 4


def test_json_lines_and_parquet(tmp_path):
    rows = [{"id": i, "body": f"text {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [row["body"] for row in rows]
    assert read(tmp_path / "a.jsonl", text_field="body") == expected
    assert read(tmp_path / "a.parquet", text_field="body") == expected
    assert read(tmp_path, text_field="body", format="parquet") == expected


def test_format_overrides_the_extension_of_a_file(tmp_path):
    (tmp_path / "dump.data").write_text('{"text": "x"}\n')
    assert read(tmp_path / "dump.data", format="jsonl") == ["x"]
    assert read(tmp_path / "dump.data", format="text") == ['{"text": "x"}\n']


def test_a_changed_file_is_read_again(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    assert read(tmp_path / "a.txt") == ["one"]
    (tmp_path / "a.txt").write_text("two, longer")
    assert read(tmp_path / "a.txt") == ["two, longer"]


def test_a_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    message = error_message(tmp_path / "trian.jsonl")
    assert "data.source=" in message
    assert "trian.jsonl" in message
    assert "'train.jsonl'" in message
    assert "no such file" in error_message(tmp_path / "nowhere" / "x")
    assert "no such file" in error_message(f"{tmp_path}/org")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert "no text in it" in error_message(tmp_path / name)
    assert "no text in it" in error_message(tmp_path)


def test_a_folder_without_files_and_blank_text_are_errors(tmp_path):
    assert "no file to read; the folder contains nothing" in error_message(tmp_path)
    (tmp_path / "a.txt").write_text(" \n\t\n")
    assert "no text in it" in error_message(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "  "}\n')
    assert "no text in it" in error_message(tmp_path)


def test_an_unknown_extension_lists_the_known_ones(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    for path in (tmp_path / "a.docx", tmp_path):
        assert ".docx" in error_message(path)
        assert ".jsonl" in error_message(path)


def test_mixed_formats_ask_for_a_choice(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"text": "y"}')
    assert "data.format" in error_message(tmp_path)
    assert read(tmp_path, format="jsonl") == ["y"]


def test_a_missing_column_lists_the_existing_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "y"}\n')
    message = error_message(tmp_path / "a.jsonl")
    assert "data.text_field=text" in message
    assert "prompt" in message
    assert "answer" in message


def test_a_column_that_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    assert "int64" in error_message(tmp_path / "a.jsonl")


@pytest.mark.parametrize("bad", ['{"text": "x"', "nonsense", '"x"'])
def test_a_bad_json_line_is_named(tmp_path, bad):
    (tmp_path / "good.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "worse.jsonl").write_text(f'{{"text": "x"}}\n\n{bad}\n{{"text": "z"}}\n')
    message = error_message(tmp_path)
    assert "worse.jsonl, line 3" in message


def test_a_file_that_does_not_match_its_extension(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really, far too short")
    assert "a.parquet" in error_message(tmp_path / "a.parquet")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert "latin.txt" in error_message(tmp_path / "latin.txt")
    assert "UTF-8" in error_message(tmp_path / "latin.txt")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "bytes.jsonl, line 2" in error_message(tmp_path / "bytes.jsonl")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("x")
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(refused))
    assert "a.txt: Permission denied" in error_message(file)


def test_an_unreachable_hub_is_reported_at_once(monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub.huggingface_hub.HfApi, "dataset_info", no_network)
    message = error_message("someorg/some-data")
    assert "someorg/some-data" in message
    assert "does not answer" in message
    assert not hub.huggingface_hub.constants.HF_HUB_OFFLINE
    assert "'python_stdlib'" in error_message("python_stdlb")


@pytest.mark.parametrize("status", [401, 404])
def test_a_hub_that_refuses(monkeypatch, status):
    class Refusal(hub.HfHubHTTPError):
        def __init__(self):
            self.response = type("Response", (), {"status_code": status})()

    def refuse(*_, **__):
        raise Refusal

    monkeypatch.setattr(hub.huggingface_hub.HfApi, "dataset_info", refuse)
    assert str(status) in error_message("meta/gated")
    assert "HF_TOKEN" in error_message("meta/gated")


def hub_data(monkeypatch, **splits: list[str]):
    loaded = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    )
    monkeypatch.setattr(hub, "_is_hub_reachable", lambda *_: True)
    monkeypatch.setattr(hub.datasets, "load_dataset", lambda *_: loaded)


def test_hub_splits_are_those_of_the_authors(monkeypatch):
    hub_data(monkeypatch, train=["a", "b"], test=["c"], validation=["d"])
    both = DataConfig(source="org/name"), EvalConfig(source="org/name")
    assert list(load_training_texts(*both)) == ["a", "b"]
    assert list(load_held_out_texts(*reversed(both))) == ["d"]
    assert list(load_held_out_texts(both[1], DataConfig())) == ["d"]


def test_a_hub_data_set_with_one_split_is_split_by_hash(monkeypatch):
    hub_data(monkeypatch, train=[f"text {i}" for i in range(50)])
    both = DataConfig(source="org/name"), EvalConfig(source="org/name")
    train, held_out = load_training_texts(*both), load_held_out_texts(*reversed(both))
    assert len(train) + len(held_out) == 50
    assert not set(train) & set(held_out)
    assert len(load_training_texts(DataConfig(source="org/name"), STDLIB_EVAL)) == 50


def test_one_file_for_both_is_split_and_equal_texts_stay_together(tmp_path):
    rows = [{"text": f"text {i % 40}"} for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "a.jsonl")
    both = DataConfig(source=source), EvalConfig(source=source)
    train, held_out = load_training_texts(*both), load_held_out_texts(*reversed(both))
    assert sorted([*train, *held_out]) == sorted(row["text"] for row in rows)
    assert not set(train) & set(held_out)
    assert len(held_out) == 6
    lowest = sorted({hashlib.sha256(r["text"].encode()).digest() for r in rows})[:2]
    assert {hashlib.sha256(text.encode()).digest() for text in held_out} == set(lowest)


def test_one_text_for_both_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("all there is")
    source = str(tmp_path / "a.txt")
    with pytest.raises(UserError, match="cannot be split"):
        load_training_texts(DataConfig(source=source), EvalConfig(source=source))


def test_sources_that_overlap_are_refused(tmp_path):
    (tmp_path / "valid.txt").write_text("x")
    data_config = DataConfig(source=str(tmp_path))
    for where in (tmp_path / "valid.txt", tmp_path / ".." / tmp_path.name):
        evaluation = EvalConfig(source=str(where))
        with pytest.raises(UserError, match="overlaps"):
            load_training_texts(data_config, evaluation)
        with pytest.raises(UserError, match="overlaps"):
            load_held_out_texts(evaluation, data_config)


def test_a_separate_file_is_held_out_completely(tmp_path):
    (tmp_path / "v.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    evaluation = EvalConfig(source=str(tmp_path / "v.jsonl"))
    assert list(load_held_out_texts(evaluation, DataConfig(text_field="body"))) == ["x", "y"]
    with pytest.raises(UserError, match=r"eval\.source=.*v\.txt"):
        load_held_out_texts(EvalConfig(source=str(tmp_path / "v.txt")), DataConfig())


def test_the_standard_library_is_split_by_module_name():
    both = DataConfig(), EvalConfig()
    train, held_out = load_training_texts(*both), load_held_out_texts(*reversed(both))
    assert len(train) > 200
    assert len(held_out) > 10
    longer = {text for text in train if len(text) > 100}  # one-line comments of packages are equal
    assert longer.isdisjoint(held_out)
    assert len(held_out) <= sum(is_held_out(name) for name, _ in stdlib_modules())


def test_nothing_is_written_to_the_working_directory(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    code = (
        "from hqqtrain.data.sources import load_training_texts;"
        "from hqqtrain.config.groups import DataConfig, EvalConfig;"
        "print(list(load_training_texts(DataConfig(source='a.txt'), EvalConfig())))"
    )
    root = Path(sources.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(root), "HF_HOME": str(tmp_path.parent / "hf"), "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == "['x']", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
