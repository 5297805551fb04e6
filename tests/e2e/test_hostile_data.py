"""Data of every kind, good and bad, through the command line: right, or one message and exit 2.

All cases run in this process with a random model of one layer, in a fraction of a second each.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import run_in_this_process
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hqqtrain.models.source import TINY_FOLDER

LINES = "".join(f"def f{i}(a): return a + {i}\n" for i in range(200))
ROWS = [{"text": f"def g{i}(x):\n    return x * {i}\n"} for i in range(60)]


def _json(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(name: str, content: str | bytes) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def _save_model(name: str = "model", change: Callable[[dict], object] = lambda _: None) -> None:
    """Save a model of one layer; `change` edits its tokenizer.json."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(name)
    shutil.copy(TINY_FOLDER / "tokenizer_config.json", name)
    tokenizer = json.loads((TINY_FOLDER / "tokenizer.json").read_text())
    change(tokenizer)
    Path(name, "tokenizer.json").write_text(json.dumps(tokenizer))


def _with_added_token(name: str) -> None:
    _save_model(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(name)


def _split(pattern: str) -> Callable[[dict], object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return lambda tokenizer: tokenizer.update(pre_tokenizer=split | {"invert": False})


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory):
    """Write the files of all cases to the working directory."""
    previous = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("data"))
    _save_model()
    _with_added_token("added")
    _save_model("backtracking", _split("(a|aa|a?a)+$"))
    _save_model("empty_tokenizer", dict.clear)
    texts = {
        "one.txt": LINES, "rows.jsonl": _json(ROWS), "copy.jsonl": _json(ROWS[::-1]),
        "split/train.jsonl": _json(ROWS), "split/validation.jsonl": _json([{"text": "import os"}]),
        "leaky/train.jsonl": _json(ROWS), "leaky/dev.jsonl": _json(ROWS[:9]),
        "char.txt": "x", "two.jsonl": _json([{"text": "x"}, {"text": "y"}]), "empty.jsonl": "",
        "blank.txt": " \n\t", "line.txt": "x = 1; " * 20_000, "single.csv": "text\nx\n",
        "csv/a.csv": "text\nx y\n\"a, b\"\nc d\n",
        "mixed/a.txt": "x", "mixed/b.jsonl": _json(ROWS), "hidden/.a.txt": "x",
        "list.jsonl": _json([{"text": ["a"]}]), "chat.jsonl": _json([{"messages": []}]),
        "turns.jsonl": _json([
            {"messages": [{"role": "user", "content": f"What is {i}?"},
                          {"role": "assistant", "content": f"{i} is a number."}]}
            for i in range(60)
        ]),
        "alpaca.csv": "instruction,output\n" + "".join(f'"Say, {i}",x {i}\n' for i in range(60)),
        "completions.jsonl": _json([{"prompt": f"a {i}", "completion": "b"} for i in range(60)]),
        "tokens.jsonl": _json([{"input_ids": [5, i], "labels": [-100, i]} for i in range(60)]),
        "unknown.jsonl": _json([{"input_ids": [5, 5000]}]),
        "pairs.jsonl": _json([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        "number.jsonl": _json([*ROWS, {"text": 2}]), "null.jsonl": _json([{"text": None}] * 9),
        "types.jsonl": _json([ROWS[0] | {"x": 1}, ROWS[1] | {"x": "y"}, ROWS[2] | {"x": None}]),
        "deep.jsonl": '{"text": ' + "[" * 100_000, "same.jsonl": _json([{"text": "same"}] * 50),
        "half.jsonl": _json(ROWS) + '{"text": "\\ud800"}', "test/test_a.txt": LINES,
        "token.txt": "<|im_start|> x = 1\n" * 50, "a.txt": "a" * 40 + "!\n" + LINES,
    }  # fmt: skip
    for name, content in texts.items():
        _write(name, content)
    _write("packed/a.jsonl.gz", gzip.compress(_json(ROWS).encode()))
    _write("cut.jsonl.gz", gzip.compress(_json(ROWS).encode())[:-9])
    _write("binary.txt", bytes(range(255, -1, -1)) * 10)
    _write("utf16.txt", LINES.replace("\n", "\r\n").encode("utf-16"))
    pq.write_table(pa.table({"text": [None, LINES, LINES[:99]]}), "null.parquet")
    pq.write_table(pa.table({"text": [[1], [2]]}), "list.parquet")
    Path("link.jsonl").symlink_to("rows.jsonl")
    Path("broken").mkdir()
    Path("broken/a.txt").symlink_to("nowhere")
    os.mkfifo("fifo")
    yield
    os.chdir(previous)


CASES: dict[str, tuple[str, int, str]] = {
    "one text": ("data.source=one.txt", 0, "is a single text; its last"),
    "rows": ("data.source=rows.jsonl", 0, "2 of 60 texts are held out"),
    "the same twice": ("data.source=rows.jsonl eval.source=./rows.jsonl", 0, "2 of 60 texts"),
    "a link": ("data.source=rows.jsonl eval.source=link.jsonl", 0, "2 of 60 texts"),
    "a copy": ("data.source=rows.jsonl eval.source=copy.jsonl", 2, "60 of 60 held-out texts"),
    "splits": ("data.source=split", 0, "held out 1, such as validation.jsonl"),
    "a split by name": ("data.source=split eval.source=split/validation.jsonl", 0, ""),
    "splits without evaluation": ("data.source=split eval.source=null", 0, "held out 1, such as"),
    "splits that overlap": ("data.source=leaky", 2, "9 of 9 held-out texts"),
    "half": ("data.source=rows.jsonl data.validation=0.5", 0, "30 of 60 texts"),
    "none held out": ("data.source=rows.jsonl data.validation=0", 2, "data.validation=0.0"),
    "all held out": ("data.source=rows.jsonl data.validation=0.999", 2, "cannot be split"),
    "two rows": ("data.source=two.jsonl", 0, "1 of 2 texts"),
    "one character": ("data.source=char.txt", 2, "cannot be split"),
    "one line": ("data.source=line.txt", 2, "cannot be split"),
    "one line to train on": ("data.source=line.txt eval.source=null", 0, ""),
    "equal rows": ("data.source=same.jsonl", 2, "cannot be split"),
    "empty": ("data.source=empty.jsonl", 2, "every file is empty"),
    "blank": ("data.source=blank.txt", 2, "no text in it"),
    "null": ("data.source=null.jsonl", 2, "every row of 'text' is empty"),
    "test files": ("data.source=test", 2, "no file to train on"),
    "csv": ("data.source=csv eval.source=null", 0, "3 rows of text (text)"),
    "one row of csv": ("data.source=single.csv", 2, "cannot be split"),
    "csv as jsonl": ("data.source=csv/a.csv data.file_type=jsonl", 2, "a.csv, line 1"),
    "mixed": ("data.source=mixed", 2, "choose one with data.file_type"),
    "a choice": ("data.source=mixed data.file_type=jsonl", 0, ""),
    "an old name": ("data.source=mixed data.format=jsonl", 2, "use data.file_type=jsonl"),
    "hidden": ("data.source=hidden", 2, "contains nothing"),
    "compressed": ("data.source=packed", 0, "2 of 60 texts"),
    "cut off": ("data.source=cut.jsonl.gz", 2, "cut.jsonl.gz"),
    "no such field": ("data.source=rows.jsonl data.text_field=tex", 2, "it has text. Did you mean"),
    "chat": ("data.source=chat.jsonl", 2, "line 1: messages is an empty list"),
    "a chat": (
        "data.source=turns.jsonl data.chat_template=chatml train.max_seq_len=64",
        0,
        "60 rows of chat (messages)",
    ),
    "a chat without a template": ("data.source=turns.jsonl", 2, "data.chat_template"),
    "instructions": (
        "data.source=alpaca.csv train.max_seq_len=64",
        0,
        "60 rows of alpaca (instruction, output)",
    ),
    "completions": ("data.source=completions.jsonl", 0, "60 rows of completion (prompt, com"),
    "tokens": ("data.source=tokens.jsonl", 0, "60 rows of tokens (input_ids, labels)"),
    "unknown tokens": ("data.source=unknown.jsonl eval.source=rows.jsonl", 2, "the id 5000"),
    "several sources": (
        "data.source=[{path:rows.jsonl,repeats:2},alpaca.csv]",
        0,
        " x 2) of rows.jsonl, ",
    ),
    "several sources, of which one is wrong": (
        "data.source=[{path:rows.jsonl,repeat:2},alpaca.csv]",
        2,
        "Did you mean 'repeats'?",
    ),
    "pairs": ("data.source=pairs.jsonl", 2, "has preference pairs (chosen, rejected)"),
    "a list": ("data.source=list.jsonl", 2, "line 1: data.text_field=text is a list"),
    "a number": ("data.source=number.jsonl", 2, "line 61: data.text_field=text is a number"),
    "other types": ("data.source=types.jsonl", 0, "1 of 3 texts"),
    "deep": ("data.source=deep.jsonl", 2, "line 1: too deeply nested"),
    "half a character": ("data.source=half.jsonl", 2, "line 61: data.text_field=text has"),
    "binary": ("data.source=binary.txt", 2, "not UTF-"),
    "UTF-16": ("data.source=utf16.txt", 0, "is a single text"),
    "null in parquet": ("data.source=null.parquet", 0, "1 of 2 texts"),
    "lists in parquet": ("data.source=list.parquet", 2, "contains list"),
    "a broken link": ("data.source=broken", 2, "broken/a.txt: No such file"),
    "a pipe": ("data.source=fifo", 2, "neither a file nor a folder"),
    "no name": ("data.source=", 2, "data.source=: must not be empty"),
    "a long name": ("data.source=./" + "x" * 5000, 2, "File name too long"),
    "no user": ("data.source='~no_such_user/x'", 2, "~no_such_user/x: cannot be read"),
    "no file": ("data.source=row.jsonl", 2, "Did you mean 'rows.jsonl'?"),
    "no held-out file": ("data.source=one.txt eval.source=no.txt", 2, "eval.source=no.txt"),
    "an added token": ("data.source=token.txt model.name_or_path=added", 2, "the id 4096"),
    "an added token held out": (
        "data.source=one.txt eval.source=token.txt model.name_or_path=added",
        2,
        "eval.source=token.txt: its text has the token '<|im_start|>'",
    ),
    "an added token unused": ("data.source=one.txt model.name_or_path=added", 0, ""),
    "backtracking": ("data.source=a.txt model.name_or_path=backtracking", 2, "cannot encode"),
    "no tokenizer": ("data.source=one.txt model.name_or_path=empty_tokenizer", 2, "tokenizer"),
}
"""Name -> arguments, exit code, and a part of the output."""


@pytest.mark.parametrize("case", CASES)
def test_data_is_read_or_refused_with_one_message(case: str, capfd, tmp_path):
    arguments, expected_code, expected_output = CASES[case]
    code = run_in_this_process([
        "model.name_or_path=model", "quant.group_size=16", "quant.calibration=null",
        "train.max_steps=1", "train.global_batch_size=1", "train.max_seq_len=32", "eval.tokens=256",
        "eval.samples=0", "track.backends=[]", f"run.root={tmp_path}", *arguments.split(" "),
    ])  # fmt: skip
    output = "".join(capfd.readouterr())
    assert code == expected_code, output
    assert expected_output in output
    assert "Traceback" not in output
    if expected_code == 2:
        assert output.count("hqqtrain: error: ") == 1
        assert list(tmp_path.iterdir()) == []
