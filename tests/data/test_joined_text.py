"""All held-out rows are one text, which is cut as the scripts of GPTQ and hqq cut it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from hqqtrain.common.errors import UserError
from hqqtrain.config.eval_protocols import JOINED_PROTOCOLS
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.joined_text import joined_rows
from hqqtrain.models.source import TINY_FOLDER

ROWS = ["", " = A title = \n", "", *(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)), ""]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_FOLDER)


@pytest.fixture
def source(tmp_path) -> Path:
    return _write(tmp_path / "rows.jsonl", ROWS)


def _write(file: Path, rows: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def _windows(source: Path, tokenizer, protocol: str, tokens: int = 1 << 20, **data):
    evaluation = EvalConfig(source=str(source), protocol=protocol, tokens=tokens)
    return load_eval_set(evaluation, DataConfig(source="other.txt", **data), tokenizer, 64)


def test_rows_are_joined_with_blank_lines_blank_rows_included(source, tokenizer):
    evaluation = EvalConfig(source=str(source), protocol="hqq")
    assert list(joined_rows(evaluation, DataConfig())) == ROWS
    ids = tokenizer("\n\n".join(ROWS))["input_ids"]
    windows = _windows(source, tokenizer, "hqq")
    targets = windows.stream[windows.targets]
    assert targets.tolist() == ids  # each token is a target of one window, with the first one
    assert windows.target_token_count == len(ids) - 1
    windows = _windows(source, tokenizer, "wikitext2_2048")
    assert windows.stream.tolist() == ids[: len(ids) // 2048 * 2048]
    assert (windows.end - windows.begin == 2048).all()
    assert windows.target_token_count == len(windows) * 2047


def test_each_window_begins_a_text_and_predicts_its_last_tokens(source, tokenizer):
    windows, begin = _windows(source, tokenizer, "hqq"), 0
    for window in windows:
        assert window["position_ids"].tolist() == list(range(len(window["input_ids"])))
        predicted = np.flatnonzero(window["labels"] >= 0)
        assert predicted[0] == (1 if begin == 0 else 512)
        assert (np.diff(predicted) == 1).all()
        begin += 512
    *full, last = (windows.end - windows.begin)[1:].tolist()
    assert set(full) == {1024}
    assert 512 < last < 1024


@pytest.mark.parametrize(("protocol", "tokens"), [("hqq", 1500), ("wikitext2_2048", 4095)])
def test_tokens_are_rounded_down_to_whole_windows(source, tokenizer, caplog, protocol, tokens):
    everything = _windows(source, tokenizer, protocol)
    assert not caplog.text
    some = _windows(source, tokenizer, protocol, tokens)
    assert len(some) == tokens // JOINED_PROTOCOLS[protocol].stride
    whole = everything.select(range(len(some)))
    assert all((a["labels"] == b["labels"]).all() for a, b in zip(some, whole, strict=True))
    measured, total = int(some.targets.sum()), int(everything.targets.sum())
    assert (
        f"eval.tokens={tokens}: the first {measured:,} of {total:,} tokens are measured"
        in caplog.text
    )


def test_special_tokens_are_those_of_the_tokenizer(source, tokenizer):
    ids = tokenizer("\n\n".join(ROWS))["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer.eos_token_id == 0
    windows = _windows(source, tokenizer, "hqq")
    assert windows.stream[windows.targets].tolist() == [0, *ids]  # hqq's script sets no EOS
    windows = _windows(source, tokenizer, "wikitext2_2048")
    assert windows.stream.tolist() == [0, *ids, 0][: len(windows.stream)]


@pytest.mark.parametrize("protocol", JOINED_PROTOCOLS)
def test_a_text_shorter_than_a_window_is_refused(tmp_path, tokenizer, protocol):
    source = _write(tmp_path / "short.jsonl", ROWS[:40])
    with pytest.raises(UserError, match=rf"fewer than a window of eval.protocol={protocol}"):
        _windows(source, tokenizer, protocol)


CHAT = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]}


@pytest.mark.parametrize(
    "row", [CHAT, {"input_ids": [1, 2, 3]}, {"prompt": "a", "completion": "b"}]
)
def test_rows_that_are_no_text_are_refused(tmp_path, tokenizer, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"eval.protocol=hqq: measures plain text, but the rows of"):
        _windows(tmp_path / "rows.jsonl", tokenizer, "hqq")


def test_a_stream_has_to_be_held_out_by_a_source_of_its_own(source, tokenizer):
    assert len(_windows(source, tokenizer, "hqq", streaming=True))
    data = DataConfig(source=str(source), streaming=True)
    with pytest.raises(UserError, match=r"data\.streaming=true reads only the first ones"):
        load_eval_set(EvalConfig(protocol="hqq"), data, tokenizer, 64)
    data = replace(data, streaming=False, validation=0.9)
    assert len(load_eval_set(EvalConfig(protocol="hqq"), data, tokenizer, 64))
