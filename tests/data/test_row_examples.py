"""Rows that cannot be used: an error that names them, or so many as `data.max_bad_rows` allows."""

import json
from pathlib import Path

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.examples import Conversation
from hqqtrain.data.sources import count_rows, load_held_out_texts, load_training_texts

NO_EVAL = EvalConfig(source=None)


def chats(count: int, start: int = 0) -> list[str]:
    return [
        json.dumps({"messages": [{"role": "user", "content": f"number {i}"},
                                 {"role": "assistant", "content": f"answer {i * i}"}]})
        for i in range(start, start + count)
    ]  # fmt: skip


def load(file: Path, lines: list[str], **settings: object) -> list:
    file.write_text("\n".join(lines) + "\n")
    return list(load_training_texts(DataConfig(source=str(file), **settings), NO_EVAL))


BAD = ['{"messages": []}', '{"messages": [', '{"text": "x"}', "[]", '{"messages": "Hello"}']


@pytest.mark.parametrize("bad", BAD)
def test_the_first_bad_row_is_an_error(tmp_path, bad):
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.jsonl", [*chats(3), bad, *BAD])
    message = str(caught.value)
    assert message.startswith(f"data.source={tmp_path}/a.jsonl: cannot read {tmp_path}/a.jsonl, ")
    assert "a.jsonl, line 4: " in message
    assert message.endswith("To leave out bad rows, set data.max_bad_rows.")
    assert message.count("\n") == 0


def test_some_bad_rows_are_left_out_and_named_once(tmp_path, caplog):
    lines = [*chats(3), *BAD, BAD[0], *chats(2, start=3)]
    examples = load(tmp_path / "a.jsonl", lines, max_bad_rows=6)
    assert len(examples) == 5
    assert all(isinstance(example, Conversation) for example in examples)
    load(tmp_path / "a.jsonl", lines, max_bad_rows=6)
    (record,) = [r for r in caplog.records if "left out" in r.message]
    assert record.levelname == "WARNING"
    assert "6 of 11 rows cannot be read and are left out (data.max_bad_rows=6)" in record.message
    assert all(f"a.jsonl, line {line}: " in record.message for line in range(4, 9))
    assert "line 9" not in record.message  # five are named


def test_unusual_rows_are_counted_and_answers_without_a_word_named(tmp_path, caplog):
    silent = [{"role": "user", "content": "say nothing"}, {"role": "assistant", "content": " "}]
    call = {**silent[1], "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [silent, [*silent, *silent], [silent[0], call], [*silent, silent[0], call], silent[:1]]
    lines = [*chats(3), BAD[0], *(json.dumps({"messages": row}) for row in rows)]
    file = tmp_path / "a.jsonl"
    load(file, lines, max_bad_rows=1)
    load(file, lines, max_bad_rows=1)
    (message,) = [m for m in caplog.messages if "without a word" in m]
    assert message.startswith(f"data.source={file}: 2 of 9 rows have an answer without a word")
    assert count_rows(DataConfig(source=str(file), max_bad_rows=1)) == (1, 0, 2)
    pairs = tmp_path / "b.jsonl"
    pairs.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "b"}')
    assert count_rows(DataConfig(source=[str(file), str(pairs)], max_bad_rows=1)) == (1, 0, 3)
    texts = tmp_path / "c.jsonl"
    texts.write_text('{"text": null}\n{"text": " "}\n{"text": "b"}')
    assert count_rows(DataConfig(source=str(texts))) == (0, 2, 0)


def test_one_bad_row_too_many(tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.jsonl", [*chats(3), *BAD], max_bad_rows=4)
    assert "more than 4 rows cannot be read (data.max_bad_rows=4), such as" in str(caught.value)
    assert "line 4: " in str(caught.value)


def test_bad_rows_only(tmp_path):
    with pytest.raises(UserError, match=r"no row can be read, such as .*line 1: "):
        load(tmp_path / "a.jsonl", BAD[:1], max_bad_rows=4)


def test_the_log_names_the_format_once(tmp_path, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(chats(1234)))
    data = DataConfig(source=str(file))
    assert len(list(load_training_texts(data, EvalConfig()))) == 1209
    assert len(list(load_held_out_texts(EvalConfig(), data))) == 25
    assert caplog.messages.count(f"data.source={file}: 1,234 rows of chat (messages).") == 1
    (tmp_path / "b.txt").write_text("one")
    list(load_training_texts(DataConfig(source=str(tmp_path / "b.txt")), NO_EVAL))
    assert f"data.source={tmp_path}/b.txt: 1 file of text." in caplog.messages


def test_equal_chats_stay_together_and_shared_ones_are_found(tmp_path):
    both = DataConfig(source=str(tmp_path / "a.jsonl"), validation=0.2), EvalConfig()
    (tmp_path / "a.jsonl").write_text("\n".join(chats(20) * 3))
    train = list(load_training_texts(*both))
    held_out = list(load_held_out_texts(*reversed(both)))
    assert len(train) + len(held_out) == 60
    assert not any(example in held_out for example in train)
    (tmp_path / "b.jsonl").write_text("\n".join(chats(5)))
    with pytest.raises(UserError, match="5 of 5 held-out texts"):
        load_training_texts(both[0], EvalConfig(source=str(tmp_path / "b.jsonl")))
    (tmp_path / "a.jsonl").write_text(chats(1)[0])
    with pytest.raises(UserError, match="has a single row, which cannot be split"):
        load_training_texts(*both)


def test_the_held_out_source_has_a_format_of_its_own(tmp_path):
    (tmp_path / "chat.jsonl").write_text("\n".join(chats(2)))
    (tmp_path / "held.txt").write_text("plain text")
    (tmp_path / "held.jsonl").write_text('{"text": "a row of text"}')
    (tmp_path / "both.jsonl").write_text(json.dumps({"text": "b", **json.loads(chats(1)[0])}))
    for format in ("auto", "chat"):
        data = DataConfig(source=str(tmp_path / "chat.jsonl"), format=format)
        for name, expected in (("held.txt", "plain text"), ("held.jsonl", "a row of text")):
            evaluation = EvalConfig(source=str(tmp_path / name))
            assert list(load_held_out_texts(evaluation, data)) == [expected]
    data = DataConfig(source="x.txt", text_field="body")
    evaluation = EvalConfig(source=str(tmp_path / "held.jsonl"))
    assert list(load_held_out_texts(evaluation, data)) == ["a row of text"]
    evaluation = EvalConfig(source=str(tmp_path / "both.jsonl"))
    for format, kind in (("text", str), ("chat", Conversation)):
        (example,) = load_held_out_texts(evaluation, DataConfig(format=format))
        assert isinstance(example, kind)


def test_files_of_plain_text_have_no_other_format(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"data\.format=chat: .*a\.txt has files of plain text"):
        load_training_texts(DataConfig(source=str(tmp_path / "a.txt"), format="chat"), NO_EVAL)
