"""Sources: every kind is read correctly, and every error is one message with key and file."""

import gzip
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
from hqqtrain.data import hub, sources, stdlib
from hqqtrain.data.examples import Conversation
from hqqtrain.data.sources import (
    dataset_name,
    load_held_out_texts,
    load_training_texts,
    source_format,
)
from hqqtrain.data.stdlib import is_held_out

NO_EVAL = EvalConfig(source=None)
STDLIB_EVAL = EvalConfig(source="python_stdlib")


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
    assert read(tmp_path, text_field="body", file_type="parquet") == expected


def test_the_file_type_overrides_the_extension_of_a_file(tmp_path):
    (tmp_path / "dump.data").write_text('{"text": "x"}\n')
    assert read(tmp_path / "dump.data", file_type="jsonl") == ["x"]
    assert read(tmp_path / "dump.data", file_type="text") == ['{"text": "x"}\n']


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
    assert "data.file_type" in error_message(tmp_path)
    assert read(tmp_path, file_type="jsonl") == ["y"]


def test_a_missing_column_lists_the_existing_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "y"}\n')
    message = error_message(tmp_path / "a.jsonl")
    assert "data.text_field=text" in message
    assert "prompt" in message
    assert "answer" in message


def test_a_column_that_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    message = error_message(tmp_path / "a.jsonl")
    assert "a.jsonl, line 1: data.text_field=text is a number" in message
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    message = error_message(tmp_path / "a.parquet")
    assert "a.parquet: data.text_field=text contains int64" in message


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
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)


def test_hub_splits_are_those_of_the_authors(monkeypatch):
    hub_data(monkeypatch, train=["a", "b"], test=["c"], validation=["d"])
    both = DataConfig(source="org/name"), EvalConfig(source="org/name")
    assert list(load_training_texts(*both)) == ["a", "b"]
    assert list(load_held_out_texts(*reversed(both))) == ["d"]
    assert list(load_held_out_texts(both[1], DataConfig())) == ["d"]
    joined = EvalConfig(source="org/name", protocol="wikitext2_2048")  # measures the split test
    assert list(load_held_out_texts(joined, both[0])) == ["c"]
    assert list(load_held_out_texts(joined, DataConfig())) == ["c"]
    assert list(load_training_texts(both[0], joined)) == ["a", "b"]


def test_the_digest_of_a_hub_data_set_is_that_of_its_rows(monkeypatch, tmp_path):
    digests = []
    for rows in (["a", "b"], ["a", "c"], ["a", "b"]):
        hub_data(monkeypatch, train=rows, test=["d"])
        digests.append(hub.hub_digest("org/name", "data.source"))
    assert digests[0] == digests[2] != digests[1]
    for rows in (["a", "b"], ["a", "c"]):  # the files of the cache
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / rows[1])
        split = datasets.Dataset.load_from_disk(str(tmp_path / rows[1]))
        assert split.cache_files
        loaded = datasets.DatasetDict({"train": split})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, loaded=loaded: loaded)
        digests.append(hub.hub_digest("org/name", "data.source"))
    assert len(set(digests)) == 4


def test_a_hub_data_set_with_one_split_is_split_by_hash(monkeypatch):
    hub_data(monkeypatch, train=[f"text {i}" for i in range(50)])
    both = DataConfig(source="org/name"), EvalConfig(source="org/name")
    train, held_out = list(load_training_texts(*both)), list(load_held_out_texts(*reversed(both)))
    assert len(train) + len(held_out) == 50
    assert not set(train) & set(held_out)
    assert list(load_training_texts(DataConfig(source="org/name"), EvalConfig())) == train
    assert len(list(load_training_texts(DataConfig(source="org/name"), STDLIB_EVAL))) == 50


def test_one_file_for_both_is_split_and_equal_texts_stay_together(tmp_path):
    rows = [{"text": f"text {i % 40}"} for i in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "a.jsonl")
    both = DataConfig(source=source, validation=0.05), EvalConfig(source=source)
    train, held_out = load_training_texts(*both), list(load_held_out_texts(*reversed(both)))
    assert sorted([*train, *held_out]) == sorted(row["text"] for row in rows)
    assert not set(train) & set(held_out)
    assert len(held_out) == 6
    assert list(load_held_out_texts(EvalConfig(), both[0])) == held_out
    lowest = sorted({hashlib.sha256(r["text"].encode()).digest() for r in rows})[:2]
    assert {hashlib.sha256(text.encode()).digest() for text in held_out} == set(lowest)


def test_one_text_for_both_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("all there is")
    source = str(tmp_path / "a.txt")
    with pytest.raises(UserError, match="cannot be split"):
        load_training_texts(DataConfig(source=source), EvalConfig(source=source))


def test_one_text_of_several_lines_is_split_at_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    data = DataConfig(source=str(tmp_path / "a.txt"), validation=0.1)
    (train,) = load_training_texts(data, EvalConfig())
    (held_out,) = load_held_out_texts(EvalConfig(), data)
    assert train + held_out == (tmp_path / "a.txt").read_text()
    assert held_out.startswith("line ")
    assert 0.1 <= len(held_out) / len(train + held_out) < 0.12


def overlap_message(data: Path | str, held_out: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_training_texts(DataConfig(source=str(data)), EvalConfig(source=str(held_out)))
    return str(caught.value)


def test_sources_that_share_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("first text\nof two lines\n")
    (folder / "b.txt").write_text("second text")
    (tmp_path / "copy.txt").write_bytes(b"first  text\r\nof two lines")
    (tmp_path / "link.txt").symlink_to(folder / "b.txt")
    (tmp_path / "copy.jsonl").write_text(json.dumps({"text": "second text"}))
    pq.write_table(pa.table({"text": ["second text"]}), tmp_path / "copy.parquet")
    for copy in ("mine/a.txt", "copy.txt", "link.txt", "copy.jsonl", "copy.parquet"):
        for data, held_out in ((folder, tmp_path / copy), ("~/mine", f"~/{copy}")):
            assert "1 of 1 held-out texts" in overlap_message(data, held_out)
    assert "overlaps" in overlap_message(folder / "a.txt", folder)  # the other way round
    assert "1 of 2 held-out texts" in overlap_message(folder / "a.txt", folder)


def test_the_same_source_under_another_name_is_split(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(50):
        (mine / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "link").symlink_to(mine)
    data = DataConfig(source=str(mine))
    expected = list(load_training_texts(data, EvalConfig()))
    assert len(expected) == 49
    for name in ("~/mine", tmp_path / "link", mine / ".." / "mine", f"{mine}/"):
        evaluation = EvalConfig(source=str(name))
        assert list(load_training_texts(data, evaluation)) == expected
        assert len(list(load_held_out_texts(evaluation, data))) == 1


def test_a_few_equal_texts_are_warned_about(tmp_path, caplog):
    shared = [f"text {i}" for i in range(3)]
    for name in ("train", "held"):
        rows = [*shared, *(f"{name}: a text of its own, number {i}" for i in range(40))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": r}) for r in rows))
    data = DataConfig(source=str(tmp_path / "train.jsonl"))
    evaluation = EvalConfig(source=str(tmp_path / "held.jsonl"))
    assert len(list(load_training_texts(data, evaluation))) == 43
    assert "3 of 43 held-out texts, with 1.3% of the characters" in caplog.text


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train.jsonl", "validation.jsonl"), ("a.jsonl", "valid.jsonl"), ("a.jsonl", "val_1.jsonl"),
        ("x-train.jsonl", "x-dev.jsonl"), ("train/a.jsonl", "test/a.jsonl"),
        ("a.jsonl", "DEV.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("train.jsonl.gz", "eval.jsonl.gz"), ("trainset.jsonl", "valset.jsonl"),
        ("trainData/a.jsonl", "validationData/a.jsonl"), ("a.jsonl", "held_out.jsonl"),
        ("a/b.jsonl", "holdout/b.jsonl"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["auto", "same", "file", None])
def test_text_under_a_held_out_name_is_never_trained_on(tmp_path, train, held_out, source):
    for name in (train, held_out):
        rows = "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(3)).encode()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    data = DataConfig(source=str(tmp_path))
    sources = {"same": str(tmp_path), "file": str(tmp_path / held_out)}
    evaluation = EvalConfig(source=sources.get(source, source))
    assert list(load_training_texts(data, evaluation)) == [f"{train} {i}" for i in range(3)]
    if source is not None:
        texts = list(load_held_out_texts(evaluation, data))
        assert texts == [f"{held_out} {i}" for i in range(3)]


@pytest.mark.parametrize("texts", [200, 1])
def test_the_split_by_hash_is_logged_once(tmp_path, caplog, texts):
    caplog.set_level("INFO")
    if texts == 1:
        (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    else:
        rows = (json.dumps({"text": f"text {i}"}) + "\n" for i in range(texts))
        (tmp_path / "a.jsonl").write_text("".join(rows))
    data = DataConfig(source=str(tmp_path))
    load_training_texts(data, EvalConfig())
    load_held_out_texts(EvalConfig(), data)
    assert len([line for line in caplog.messages if "held out" in line]) == 1


def test_skipped_rows_are_warned_about_once(tmp_path, caplog):
    rows = "".join(json.dumps({"text": f"text {i}" if i % 9 else None}) + "\n" for i in range(90))
    (tmp_path / "a.jsonl").write_text(rows)
    data = DataConfig(source=str(tmp_path))
    assert len(list(load_training_texts(data, EvalConfig()))) == 78
    assert len(list(load_held_out_texts(EvalConfig(), data))) == 2
    assert len([line for line in caplog.messages if "10 of 90 rows" in line]) == 1


def test_near_copies_in_a_source_that_is_split_by_hash_are_warned_about(tmp_path, caplog):
    texts = [
        f"number {i} has a text of its own, which is {i * i} and not {i**3}" for i in range(40)
    ]
    rows = [*texts, *(text.upper() for text in texts)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    data = DataConfig(source=str(tmp_path), validation=0.1)
    assert len(list(load_training_texts(data, EvalConfig()))) == 72
    assert "overlap with the training text" in caplog.text
    assert "too good" in caplog.text


def test_edited_copies_and_pieces_are_refused(tmp_path):
    lines = [f"value_{i} = function_{i % 7}(argument_{i * i})  # comment {i}" for i in range(60)]
    (tmp_path / "one.txt").write_text("\n".join(lines))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    (tmp_path / "paragraphs.txt").write_text("\n".join(lines[20:30]).upper() + " \r\n")
    for held_out in ("lines.jsonl", "paragraphs.txt"):
        assert "with 100.0% of the" in overlap_message(tmp_path / "one.txt", tmp_path / held_out)
    for held_out in ("one.txt", "paragraphs.txt"):
        assert "of 1 held-out texts" in overlap_message(
            tmp_path / "lines.jsonl", tmp_path / held_out
        )


def test_rows_that_are_in_both_splits_of_a_folder_are_refused(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(UserError, match="2 of 2 held-out texts"):
        load_training_texts(DataConfig(source=str(tmp_path)), EvalConfig())


def test_a_folder_of_held_out_files_only_is_refused(tmp_path):
    (tmp_path / "test.txt").write_text("x")
    assert "no file to train on" in error_message(tmp_path)
    assert read(tmp_path / "test.txt") == ["x"]


def test_a_validation_share_that_decides_nothing_is_reported(tmp_path, caplog):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    load_held_out_texts(EvalConfig(), DataConfig(source=str(tmp_path)))
    assert not caplog.text
    load_held_out_texts(EvalConfig(), DataConfig(source=str(tmp_path), validation=0.5))
    assert "data.validation=0.5: has no effect" in caplog.text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "is empty"), ("./" + "x" * 5000, "too long"), ("~no_such_user/x/y", "home"),
        ("/dev/null", "neither"),
    ],
)  # fmt: skip
def test_names_that_are_no_files_are_refused(source, reason):
    message = error_message(source)
    assert reason in message
    assert len(message) < 400


def test_hub_splits_of_other_names_are_found(monkeypatch):
    hub_data(monkeypatch, train_sft=["a", "b"], test_sft=["c"])
    data = DataConfig(source="org/name")
    assert list(load_training_texts(data, EvalConfig())) == ["a", "b"]
    assert list(load_held_out_texts(EvalConfig(), data)) == ["c"]
    hub_data(monkeypatch, train_sft=["a"], train_gen=["b"], test_sft=["c"])
    assert "has no split train" in error_message("org/name")


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_source(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hf"))
    monkeypatch.setattr(hub, "_is_hub_reachable", lambda *_: True)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: (tmp_path / "file" / "hf").mkdir(parents=True)
    )
    message = error_message("org/name")
    assert message.startswith(f"HF_HOME={tmp_path}/file/hf: the cache of Hugging Face")
    assert "Not a directory" in message
    (tmp_path / "a.txt").write_text("x")
    assert read(tmp_path / "a.txt") == ["x"]  # local files need no cache


def test_a_separate_file_is_held_out_completely(tmp_path):
    (tmp_path / "v.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n')
    evaluation = EvalConfig(source=str(tmp_path / "v.jsonl"))
    assert list(load_held_out_texts(evaluation, DataConfig(text_field="body"))) == ["x", "y"]
    with pytest.raises(UserError, match=r"eval\.source=.*v\.txt"):
        load_held_out_texts(EvalConfig(source=str(tmp_path / "v.txt")), DataConfig())


@pytest.fixture
def third_of_stdlib(monkeypatch):
    """Let the standard library have every third of its modules."""
    modules = list(stdlib.stdlib_modules())[::3]
    monkeypatch.setattr(stdlib, "stdlib_modules", lambda: iter(modules))


def test_the_standard_library_is_split_by_module_name(third_of_stdlib):
    both = DataConfig(), EvalConfig()
    train, held_out = list(load_training_texts(*both)), list(load_held_out_texts(*reversed(both)))
    assert len(train) > 70
    assert len(held_out) > 5
    longer = {text for text in train if len(text) > 100}  # one-line comments of packages are equal
    assert longer.isdisjoint(held_out)
    assert len(held_out) <= sum(is_held_out(name) for name, _ in stdlib.stdlib_modules())


def test_nothing_is_written_to_the_working_directory(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    code = (
        "from hqqtrain.data.sources import load_training_texts;"
        "from hqqtrain.config.groups import DataConfig, EvalConfig;"
        "print(list(load_training_texts(DataConfig(source='a.txt'), EvalConfig(source=None))))"
    )
    root = Path(sources.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(root), "HF_HOME": str(tmp_path.parent / "hf"), "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == "['x']", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_conversations_about_the_standard_library_are_built_in(third_of_stdlib):
    data = DataConfig(source="python_stdlib_chat")
    train = list(load_training_texts(data, EvalConfig()))
    held_out = list(load_held_out_texts(EvalConfig(), data))
    assert len(train) > len(held_out) > 0
    assert all(isinstance(example, Conversation) for example in (*train, *held_out))
    assert list(load_held_out_texts(EvalConfig(source=data.source), DataConfig())) == held_out
    assert dataset_name(EvalConfig(), data).startswith("python_stdlib_chat 3.")
    assert not {e.messages[-1]["content"] for e in train} & {
        e.messages[-1]["content"] for e in held_out
    }


def test_the_format_of_a_source_is_that_of_its_rows(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "x"}) + "\n")
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(chat) + "\n")
    for source, expected in {
        "python_stdlib": "text", "python_stdlib_chat": "chat", tmp_path / "a.txt": "text",
        tmp_path / "a.jsonl": "text (content)", tmp_path / "b.jsonl": "chat (messages)",
    }.items():  # fmt: skip
        assert source_format(DataConfig(source=str(source))) == expected
