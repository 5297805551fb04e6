"""The texts of a run with and without streaming."""

import json
from pathlib import Path

import pytest

from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.texts import held_out_texts, training_texts


@pytest.mark.parametrize("streaming", [False, True])
def test_streaming_reads_the_beginning_only(tmp_path: Path, monkeypatch, streaming):
    monkeypatch.setattr("hqqtrain.data.streaming.sources.SHOWN_EXAMPLES", 20)
    texts = [f"number {i} is {i * i}" for i in range(200)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(source=str(file), streaming=streaming, validation=0.1)
    evaluation = EvalConfig(tokens=10)
    trained, held_out = (
        list(training_texts(data, evaluation)),
        list(held_out_texts(evaluation, data)),
    )
    assert not set(trained) & set(held_out)
    if streaming:
        assert trained == [text for text in texts if text in trained][:20]
        assert sum(map(len, held_out)) < 200
    else:
        assert sorted([*trained, *held_out]) == sorted(texts)
        assert len(held_out) == 20
