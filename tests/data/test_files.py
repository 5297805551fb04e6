"""Splits by the names of files: they decide in a folder of data, and not in a source tree."""

import errno
import gzip
import json
import os
import re
from pathlib import Path

import datasets
import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.sources import load_held_out_texts, load_training_texts


def read(source: Path) -> list[str]:
    return list(load_training_texts(DataConfig(source=str(source)), EvalConfig(source=None)))


def make_files(root: Path, **sizes: int) -> None:
    """Write files of so many lines below `root`; `__` in a name is a slash, and `0` a dot."""
    for name, lines in sizes.items():
        file = root / name.replace("__", "/").replace("0", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name} {i}\n" for i in range(lines)))


CODE = {
    "pkg__train__loop0py": 9, "pkg__train__step0py": 9, "pkg__model0py": 9, "pkg__eval_set0py": 9,
    "tests__test_foo0py": 9, "test_main0py": 9, "docs__training0md": 9, "README0md": 9,
    "requirements-dev0txt": 2, "setup0py": 3,
}  # fmt: skip


@pytest.mark.parametrize("source", ["auto", "python_stdlib", None])
def test_in_a_source_tree_names_make_no_split(tmp_path, caplog, source):
    caplog.set_level("INFO")
    make_files(tmp_path, **CODE)
    data, evaluation = DataConfig(source=str(tmp_path)), EvalConfig(source=source)
    train = list(load_training_texts(data, evaluation))
    assert len(train) == len(CODE) - (source == "auto")
    assert "make no split" in caplog.text
    if source == "auto":
        (held_out,) = load_held_out_texts(evaluation, data)
        assert held_out not in train


@pytest.mark.parametrize(
    "names",
    [
        ("train__a0py", "model__b0py", "c0md"), ("train__a0py", "eval_set0py", "test_foo0py"),
        ("train0py", "eval0py"), ("train__a0py", "tests__test_a0py"), ("training0md", "testing0md"),
        ("test_a0py", "test_b0py"), ("a__train__x0py", "a__val__y0py"), ("train__a0py",),
    ],
)  # fmt: skip
def test_all_files_of_a_source_tree_are_used(tmp_path, names):
    make_files(tmp_path, **dict.fromkeys(names, 3))
    assert len(read(tmp_path)) == len(names)


@pytest.mark.parametrize(
    "sizes",
    [
        {"train__a0md": 8, "train__b0md": 8, "val__c0md": 8, "README0md": 3},
        {"train__a0py": 8, "test__x__b0py": 8}, {"train0txt": 9, "held_out0txt": 2, "README0md": 3},
        {"train0txt": 8, "dev0txt": 8, "prepare0py": 9, "README0md": 9},
        {"trainset__a0rst": 8, "devset__a0rst": 8},
    ],
)  # fmt: skip
def test_files_of_text_in_a_folder_of_splits_are_split(tmp_path, sizes):
    make_files(tmp_path, **sizes)
    texts = "".join(read(tmp_path))
    assert texts
    assert all(line.startswith("train") for line in texts.splitlines())


def test_held_out_names_that_are_trained_on_are_a_warning(tmp_path, caplog):
    make_files(tmp_path, a0md=1, b0md=1, c0py=1, validation0txt=5)
    assert len(read(tmp_path)) == 4
    (record,) = [r for r in caplog.records if "make no split" in r.message]
    assert (record.levelname, "validation.txt" in record.message) == ("WARNING", True)


@pytest.mark.parametrize(
    ("held_out", "unused", "level", "percent"),
    [(20, 0, "INFO", "17%"), (80, 0, "WARNING", "44%"), (10, 90, "WARNING", "50%")],
)
def test_a_split_that_drops_much_of_the_text_is_a_warning(
    tmp_path, caplog, held_out, unused, level, percent
):
    caplog.set_level("INFO")
    (tmp_path / "train.txt").write_bytes(b"train\n" * 100)
    (tmp_path / "val.txt").write_bytes(b"valid\n" * held_out)
    (tmp_path / "else.txt").write_bytes(b"other\n" * unused)
    assert len(read(tmp_path)) == 1
    (record,) = [r for r in caplog.records if "files by their names" in r.message]
    assert record.levelname == level
    assert f"{percent} of the bytes are not trained on" in record.message
    assert ("rename" in record.message) == (level == "WARNING")


def test_linked_folders_are_not_read_and_named(tmp_path, caplog):
    make_files(tmp_path, data__a0txt=1, other__b0txt=1)
    (tmp_path / "data" / "part").symlink_to(tmp_path / "other")
    assert len(read(tmp_path / "data")) == 1
    assert "1 linked folders are not read, such as part" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    make_files(tmp_path, a0txt=1)

    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "part").mkdir()
    monkeypatch.setattr(Path, "is_symlink", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        read(tmp_path)


def test_a_folder_that_cannot_be_read_is_no_empty_folder(tmp_path, monkeypatch):
    """Its texts would be missing from the training without a word; root can read everything."""
    make_files(tmp_path, a0txt=2, deep__locked__b0txt=2)
    iterdir = Path.iterdir

    def refuse(folder: Path):
        if folder.name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"data\.source=.*deep/locked cannot be read: Permission d"):
        read(tmp_path)


def test_a_very_deep_folder_is_read(tmp_path):
    make_files(tmp_path, a0txt=2)
    folder = tmp_path
    for _ in range(1200):  # more levels than Python recurses
        folder = folder / "d"
        folder.mkdir()
    assert len(read(tmp_path)) == 1
    while folder != tmp_path:  # shutil.rmtree would recurse
        folder.rmdir()
        folder = folder.parent


@pytest.mark.parametrize("name", ["a.XLSX", "a.ods", "folder"])
def test_a_spreadsheet_is_refused_with_the_way_to_save_it(tmp_path, name):
    source = tmp_path / name
    file = source / "a.xlsx" if name == "folder" else source
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"PK")
    with pytest.raises(UserError, match="must be saved as CSV"):
        read(source)


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.csv.gz", "folder"])
def test_a_table_is_read(tmp_path, name):
    source = tmp_path / name
    file = source / "a.csv" if name == "folder" else source
    file.parent.mkdir(exist_ok=True)
    content = b'id,my text\n1,"a, b"\n2,c\n'
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = DataConfig(source=str(source), text_field="my text")
    assert list(load_training_texts(data, EvalConfig(source=None))) == ["a, b", "c"]


def test_a_pattern_selects_files_which_names_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, a__b0txt=1, a__c0txt=1, a__d__e0txt=1, a__x0md=1, a__0h0txt=1)
    for pattern, names in {
        "a/*.txt": "bc", "./a/[!c].txt": "b", "a/**/*.txt": "bce", "~/a/?.md": "x",
    }.items():  # fmt: skip
        monkeypatch.setenv("HOME", str(tmp_path))
        texts = list(load_training_texts(DataConfig(source=pattern), EvalConfig(source=None)))
        assert [text.split("0")[0][-1] for text in texts] == list(names), pattern
    with pytest.raises(UserError, match=r"data\.source=a/\*\.csv: no file matches this pattern"):
        read(Path("a/*.csv"))
    make_files(tmp_path, s__train0jsonl=0, s__test0jsonl=0)
    for name in ("train", "test"):
        (tmp_path / "s" / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    data = DataConfig(source="s/*.jsonl")
    assert list(load_training_texts(data, EvalConfig())) == ["train"]
    assert list(load_held_out_texts(EvalConfig(), data)) == ["test"]


def test_what_save_to_disk_writes_is_read(tmp_path):
    rows = [{"text": f"text {i}", "n": i} for i in range(9)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"a copy")
    assert read(tmp_path / "one") == [row["text"] for row in rows]
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"cannot read .*00001-of-00002\.arrow: No such file"):
        read(tmp_path / "one")
    datasets.DatasetDict(train=data, test=datasets.Dataset.from_list([{"text": "x"}])).save_to_disk(
        tmp_path / "splits"
    )
    both = DataConfig(source=str(tmp_path / "splits")), EvalConfig()
    assert list(load_training_texts(*both)) == [row["text"] for row in rows]
    assert list(load_held_out_texts(*reversed(both))) == ["x"]


def test_other_unknown_extensions_are_not_called_tables(tmp_path):
    (tmp_path / "a.log.gz").write_bytes(b"a")
    with pytest.raises(
        UserError, match=r"unknown extension '\.log'.*\.gz.*data\.file_type to one of text, js"
    ) as e:
        read(tmp_path / "a.log.gz")
    assert "spreadsheet" not in str(e.value)


def test_a_file_that_is_not_read_is_named(tmp_path, caplog):
    make_files(tmp_path, a0txt=1, b__picture0png=1, c0csv=1)
    read(tmp_path)
    assert "1 of 3 files are read; the others have other extensions, such as" in caplog.text
    assert "picture.png" in caplog.text
    caplog.clear()
    (tmp_path / "data").mkdir()
    make_files(tmp_path / "data", a0txt=1, LICENSE=1)
    read(tmp_path / "data")
    assert "files are read" not in caplog.text


@pytest.mark.parametrize("source", ["./none.txt", "./a.log", "./folder"])
def test_a_message_has_the_source_as_it_was_written(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, a0log=1, folder__b0log=1)
    with pytest.raises(UserError, match=rf"^data\.source={re.escape(source)}: "):
        list(load_training_texts(DataConfig(source=source), EvalConfig(source=None)))
