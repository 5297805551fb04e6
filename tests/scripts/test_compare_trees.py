"""compare_trees.py on a made-up package: what it records, and which differences it finds."""

import json
import subprocess
import sys
from pathlib import Path

import compare_trees
import compare_trees_cases
import pytest
import torch
from safetensors.torch import save_file

SCRIPTS = Path(compare_trees.__file__).parent

PACKAGE = """
import json, pathlib, sys, time
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
if "--help" in words:
    print("train.max_steps= KEY=")
    sys.exit()
run = pathlib.Path(words["run.root"]) / words["run.name"]
run.mkdir(parents=True, exist_ok=True)
row = {"train/loss": LOSS, "time": time.time(), "memory/peak_gib": time.time()}
(run / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
(run / "status.json").write_text(json.dumps({"status": "done", "cause": sys.argv[0]}))
assert "KEY" in words
sys.exit(3)
"""


def make_tree(folder: Path, loss: str = "0.1", key: str = "quant.storage") -> Path:
    """Write a package that knows one key, and leaves a loss."""
    (folder / "hqqtrain" / "tiny").mkdir(parents=True)
    (folder / "hqqtrain" / "__init__.py").write_text("")
    main = PACKAGE.replace("LOSS", loss).replace("KEY", key)
    (folder / "hqqtrain" / "__main__.py").write_text(main)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "hqqtrain" / "tiny" / name).write_text("{}")
    return folder


def record(tree: Path, out: Path) -> None:
    """Record one case in a process of its own, without the imports that only real runs need."""
    code = "import sys, compare_trees as c; c.PRELOADED = (); sys.exit(c.main())"
    words = ["record", out, "--tree", tree, "--only", "quantize_storage_bf16"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=SCRIPTS)


@pytest.mark.e2e
def test_trees_that_differ_in_a_loss_or_in_the_name_of_a_key(tmp_path, capsys):
    trees = {"old": {}, "renamed": {"key": "quant.storage_dtype"}, "changed": {"loss": "0.2"}}
    for name, options in trees.items():
        record(make_tree(tmp_path / name, **options), tmp_path / f"{name}.out")
    old, renamed, changed = (tmp_path / f"{name}.out" for name in trees)
    (found,) = old.glob("*.json")
    run = json.loads(found.read_text())["runs"]["run"]
    assert run == {"metrics.jsonl": [{"train/loss": 0.1}], "status.json": {"status": "done"}}
    assert json.loads(found.read_text())["codes"] == [3]
    assert compare_trees.compare(old, renamed) == 0
    assert capsys.readouterr().out.startswith("equal")
    assert compare_trees.compare(old, changed) == 1
    output = capsys.readouterr().out
    assert "DIFFERENT  quantize_storage_bf16\n" in output
    assert "runs > run > metrics.jsonl[0] > train/loss: 0.1 != 0.2\n" in output
    found.unlink()
    assert compare_trees.compare(old, renamed) == 1, "a case that is missing is a difference"


def test_a_case_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no such case; there are quantize, "):
        compare_trees.record(tmp_path, tmp_path, ["nonsense"])


def test_tensors_are_compared_by_their_bits(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 3, dtype=torch.uint8)}
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "same", "bit", "metadata")]
    for file in files:
        values = dict(tensors)
        if file.stem == "bit":
            values["a"] = torch.nextafter(tensors["a"], torch.tensor(9.0))
        save_file(values, file, {"fingerprint": "y" if file.stem == "metadata" else "x"})
    one, same, bit, metadata = map(compare_trees.read_tensors, files)
    assert one["b"].startswith("U8 [2, 3] ")
    assert one == same
    assert [line.partition(":")[0] for line in compare_trees.differences(one, bit)] == ["a"]
    (line,) = compare_trees.differences(one, metadata)
    assert line == 'metadata > fingerprint: "x" != "y"'


def test_folders_named_by_a_hash_are_compared_by_what_they_hold(tmp_path):
    for name, folders in {"x": ("tiny-0123abcd", "tiny-99999999"), "y": ("t-ffffffff",)}.items():
        for index, folder in enumerate(folders):
            (tmp_path / name / folder).mkdir(parents=True)
            (tmp_path / name / folder / "errors.json").write_text(json.dumps({"all": 5 - index}))
    first, second = (compare_trees.observe(tmp_path / name) for name in "xy")
    assert first == {"<hashed>": [{"errors.json": {"all": 4}}, {"errors.json": {"all": 5}}]}
    assert [*compare_trees.differences(first, second)] != []
    (tmp_path / "step-00000004").mkdir()
    assert "step-00000004" in compare_trees.observe(tmp_path), "the name of a checkpoint counts"


def test_nan_equals_nan_and_lengths_count():
    nan = float("nan")
    assert [*compare_trees.differences({"a": [nan]}, {"a": [nan]})] == []
    assert [*compare_trees.differences({"a": [1]}, {"a": [1, 2]})] == ["a: [1] != [1, 2]"]
    assert [*compare_trees.differences({"a": 1}, {"b": 1})] == [
        "a: only in the first",
        "b: only in the second",
    ]


def test_cases_have_names_of_their_own():
    names = [case.name for case in compare_trees_cases.all_cases()]
    assert len(names) == len(set(names))


def test_words_are_translated_where_the_tree_knows_the_new_ones():
    words = ("train.checkpointing=false", "train.objective=sft", "quant.nbits=4", "-m")
    assert compare_trees_cases.translate(words, "train.checkpointing=true") == list(words)
    assert compare_trees_cases.translate(words, "train.activation_checkpointing= next_token") == [
        "train.activation_checkpointing=false", "train.objective=next_token", "quant.nbits=4", "-m",
    ]  # fmt: skip
