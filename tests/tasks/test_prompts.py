"""Prompts are read from keys, files and standard input, each with its place."""

import gzip
import io
import json
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.generate import GenerateConfig
from hqqtrain.tasks.prompts import PlacedPrompt, read_prompts, read_prompts_file

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_prompts_of_keys_come_before_those_of_the_file(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\r\n\n  two\n", encoding="utf-16")
    prompts = read_prompts(GenerateConfig(prompt=["a", "b"], prompts_file=str(file)))
    assert prompts == [
        PlacedPrompt("a", "generate.prompt[0]"),
        PlacedPrompt("b", "generate.prompt[1]"),
        PlacedPrompt("one", f"{file}, line 1"),
        PlacedPrompt("  two", f"{file}, line 3"),
    ]
    assert read_prompts(GenerateConfig(prompt="a")) == [PlacedPrompt("a", "generate.prompt")]


def test_rows_have_prompts_or_messages(tmp_path: Path):
    rows = [
        {"prompt": "Hi"}, {"prompt": TURNS[:1]}, {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "Hi"}], "system": "Be brief."},
    ]  # fmt: skip
    file = tmp_path / "prompts.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    system = {"role": "system", "content": "Be brief."}
    expected = ["Hi", TURNS[:1], TURNS[:1], [system, TURNS[0]]]
    assert [prompt.content for prompt in read_prompts_file(str(file))] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "has neither prompt nor messages; its keys are text"),
        ({"prompt": 5}, "prompt is a number"),
        ({"messages": TURNS[1:]}, "has no message to answer"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "role is 'critic'"),
        ([], "an object such as"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, row, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps({'prompt': 'x'})}\n{json.dumps(row)}\n")
    with pytest.raises(UserError) as raised:
        read_prompts_file(str(file))
    assert f"{file}, line 2" in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\xff"])
def test_files_without_prompts(tmp_path: Path, content):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"generate\.prompts_file="):
        read_prompts_file(str(file))
    with pytest.raises(UserError, match=r"generate\.prompts_file=.*cannot read"):
        read_prompts_file(str(tmp_path))


def test_standard_input_is_read_by_lines_unless_it_is_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo"))
    prompts = read_prompts(GenerateConfig())
    assert [(p.content, p.place) for p in prompts or ()] == [
        ("one", "standard input, line 1"), ("two", "standard input, line 3"),
    ]  # fmt: skip
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    assert read_prompts(GenerateConfig()) is None
    binary = io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", binary)
    with pytest.raises(UserError, match="standard input: is not text"):
        read_prompts(GenerateConfig())


def test_errors_name_the_prompt():
    with pytest.raises(UserError, match=r"^here: too long"), PlacedPrompt("x", "here").errors():
        raise UserError("too long")
