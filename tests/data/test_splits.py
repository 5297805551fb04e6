"""Splits by name: the same as those of `datasets`, but in upper case as well."""

from pathlib import Path

import pytest
from datasets.data_files import DataFilesList, get_data_patterns

from hqqtrain.data.splits import split_files, split_of_name

NAMES = (
    "train.txt", "training-1.txt", "x_train_2.txt", "validation.txt", "valid.txt", "val.txt",
    "dev 1.txt", "my.dev.txt", "test.txt", "testing.txt", "eval.txt", "evaluation0.txt",
    "trainer.txt", "valley.txt", "latest.txt", "devices.txt", "contest.txt", "notes.txt",
)  # fmt: skip


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize("name", NAMES)
def test_the_split_of_a_file_is_that_of_datasets(tmp_path, folder, name):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / name).write_text("x")
    (expected,) = get_data_patterns(str(tmp_path))  # files without a split are for training there
    assert (split_of_name(name) or "train") == str(expected)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "trainset.jsonl trainData x_trainSet TRAINING_DATA XMLTrain.txt"),
        (
            "validation",
            "valset.jsonl validationData devset dev-00000-of-00001.parquet my_corpus_valid.txt "
            "x.val.jsonl VALSET.txt ValSet valData.json dev_set.txt validset.gz val2017 myVALSet "
            "validation_split.jsonl.zst VaLiDaTiOn.txt a(val).txt val@2x.txt corpus+dev.txt",
        ),
        (
            "test",
            "testset testData test_a eval.jsonl held_out.jsonl heldout holdout hold-out HeldOut "
            "held.out.txt my-heldout-set.parquet holdout_data held_out_03.jsonl evalSet testB.txt",
        ),
        (
            None,
            "trainer.txt tests devil.txt values.jsonl evaluate.txt contest testify.txt "
            "upheld_outcome.txt holdouts_of_war.txt trainspotting.txt household.txt Devices.txt a",
        ),
    ],
)  # fmt: skip
def test_more_spellings_than_those_of_datasets(split, names):
    assert {name: split_of_name(name) for name in names.split()} == dict.fromkeys(
        names.split(), split
    )


@pytest.mark.parametrize("folder", ["train", "my-val", "dev_2", "test", "x.eval.y", "latest"])
def test_the_split_of_a_folder_is_that_of_datasets(tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "a.txt").write_text("x")
    patterns = get_data_patterns(str(tmp_path))
    ((split, files),) = split_files([tmp_path / folder / "a.txt"], tmp_path).items()
    assert [split or "train"] == [str(name) for name in patterns]
    found = DataFilesList.from_patterns(patterns[split or "train"], base_path=str(tmp_path))
    assert [str(file) for file in files] == list(found)


def test_folders_come_first_and_the_root_has_no_say():
    root = Path("/data/test")
    files = [root / name for name in ("train/val.txt", "val/train.txt", "VAL.txt", "a/b.txt")]
    assert split_files(files, root) == {
        "train": files[:1], "validation": files[1:3], None: files[3:],
    }  # fmt: skip
