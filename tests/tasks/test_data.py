"""task=data shows what a training would be trained on, and reads no weights."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig
from hqqtrain.config.model import ModelConfig
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences
from hqqtrain.data.statistics import token_masks
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks import data as task
from hqqtrain.tasks.data import Sampler, load_data_model, sample_indices, show_data
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.inference import quantize


@pytest.fixture
def tokenizer():
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture
def look(make_config, start_run):
    """Return a function that runs task=data and returns the run."""

    def look(**groups: dict):
        config = make_config("data", **groups)
        with start_run(config) as run:
            show_data(run)
        return run

    return look


def _masked(data: TokenSequences, trained: slice) -> TokenSequences:
    """Return `data` with the tokens of each example at `trained` as targets, and no others."""
    targets = np.zeros_like(data.targets)
    for start, end in zip(data.starts, [*data.starts[1:], len(data.stream)], strict=True):
        targets[start:end][trained] = True
    targets[data.starts] = False
    return replace(data, targets=targets)


def test_left_out_rows_and_held_out_text_have_figures(look, tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "completion": "" if i == 3 else f"c{i}"} for i in range(9)]
    lines = [*map(json.dumps, rows), "no json", json.dumps({"prompt": "p", "completion": 5})]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = {"source": str(tmp_path / "pairs.jsonl"), "max_bad_rows": 2, "show": 0}
    run = look(data=data, eval={"source": "auto", "tokens": 3})
    output = capsys.readouterr().out
    assert "left out: bad rows                2" in output
    assert "answers without a word            1, only the end is trained" in output
    metrics = run.recorder.summary.content.data
    assert metrics.left_out == {"bad rows": 2}
    assert metrics.empty_answers == 1
    assert metrics.examples + metrics.held_out["examples"] == 9
    assert 0 < metrics.held_out["measured_tokens"] <= 3 < metrics.held_out["tokens"]
    held_out = metrics.held_out
    assert 0 < held_out["predicted_tokens"] < held_out["measured_tokens"]
    assert f"held-out tokens                   {held_out['tokens']}, of which an eval" in output
    assert f"and predicts {held_out['predicted_tokens']}" in output


def test_joined_held_out_texts_have_windows(look, tmp_path, capsys):
    (tmp_path / "held_out.txt").write_text("x = 1\n" * 600)
    evaluation = {"source": str(tmp_path / "held_out.txt"), "protocol": "hqq", "tokens": 1024}
    look(data={"show": 0}, eval=evaluation)
    output = capsys.readouterr().out
    assert "held-out windows                  2" in output
    assert "1,536, of which an evaluation reads 1,536 and predicts 1,023" in output


def test_plain_text_is_shown_as_the_model_gets_it(look, capsys):
    run = look(data={"show": 1})
    output = capsys.readouterr().out
    assert "example 1 of 1: " in output
    assert "All tokens are trained but the first of each example" in output
    assert "  | def train_0(x): return x + 0\n  | def train_1(x)" in output
    assert "<|endoftext|>" in output
    assert f"wrote {run.layout.data_html}" in output
    assert "def train_0(x): return x + 0" in run.layout.data_html.read_text(encoding="utf-8")


def test_the_run_directory_has_figures_and_a_page_and_nothing_empty(look, tiny_model: Path):
    run = look()
    folder = run.layout.folder
    assert folder.name == "run-data"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {".lock", "config.yaml", "status.json", "summary.json", "report/data.html"}
    summary = json.loads(run.layout.summary_json.read_text())
    assert summary.keys() == {"schema", "run", "data"}
    assert summary["data"]["source"].endswith("train.txt")
    assert summary["data"]["format"] == "text"
    assert summary["data"]["examples"] == 1
    assert "left_out" not in summary["data"]
    data = load_data(run)
    assert summary["data"]["trained_tokens"] == data.target_token_count
    assert summary["data"]["sequences"] == len(data)
    assert json.loads(run.layout.status_json.read_text())["status"] == "done"


def load_data(run) -> TokenSequences:
    return task.load_training_data(run, TINY_FOLDER).sequences


def test_no_weight_is_read(look, tiny_model: Path, capsys):
    (tiny_model / "model.safetensors").unlink()
    look()
    assert "tokens per example" in capsys.readouterr().out


def test_no_tracker_is_started(look, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a tracker was started")

    monkeypatch.setattr("hqqtrain.tracking.composite.WandbTracker", fail)
    assert not look(track={"backends": ["wandb"]}).layout.metrics_jsonl.exists()


def test_every_look_is_a_new_one_and_replaces_the_last(look, capsys, tmp_path: Path):
    look()
    first = capsys.readouterr().out
    look()
    assert capsys.readouterr().out == first
    (tmp_path / "train.txt").write_text("another text\n" * 9)
    run = look(train={"max_seq_len": 16})  # other settings, too
    assert "another text" in capsys.readouterr().out
    assert "train_0" not in run.layout.data_html.read_text(encoding="utf-8")


def test_the_same_command_trains_after_the_look(look, make_config, start_run):
    looked = look()
    with start_run(make_config("finetune", eval={"source": None})) as run:
        finetune(run)
    assert run.layout.folder.name == "run"
    assert run.recorder.summary.content.train.steps == 2
    assert looked.layout.data_html.exists()


def test_a_look_does_not_replace_another_run(look, make_config, start_run):
    with start_run(make_config("quantize", run={"name": "x-data"})) as run:
        quantize(run)
    with pytest.raises(UserError, match=r"a run of another configuration: .*task=data"):
        look(run={"name": "x"})


def test_a_token_that_the_model_lacks_is_refused_as_in_a_training(look, tiny_model: Path):
    config = json.loads((tiny_model / "config.json").read_text())
    (tiny_model / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(UserError, match="only 50 embeddings"):
        look()


def _write_rows(file: Path, *rows: dict) -> dict:
    """Write rows as JSON Lines, and return the settings of the group `data` that read them."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(file), "chat_template": "chatml", "show": 9}


def _chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[number % 2], "content": text} for number, text in enumerate(texts)
        ]
    }


NO_EVAL = {"eval": {"source": None}}


@pytest.mark.parametrize("color", [False, True])
def test_completions_are_marked(look, monkeypatch, capsys, tmp_path: Path, color):
    monkeypatch.setenv("FORCE_COLOR" if color else "NO_COLOR", "1")
    row = {"prompt": "def one(x):", "completion": " return 1"}
    data = _write_rows(tmp_path / "rows.jsonl", row, row)
    run = look(data=data, **NO_EVAL)
    output = capsys.readouterr().out
    if color:
        end = "\033[32m\033[1m<|endoftext|>\033[0m"
        assert f"  | def one(x):\033[32m return 1\033[0m{end}\n" in output
    else:
        assert "  | def one(x):[[  return 1<|endoftext|> ]]\n" in output
    assert output.count("\nexample ") == 2
    page = run.layout.data_html.read_text(encoding="utf-8")
    assert "def one(x):<mark> return 1</mark><mark><b>&lt;|endoftext|&gt;</b></mark>" in page
    summary = run.recorder.summary.content.data
    assert (summary.examples, summary.duplicates) == (2, 1)
    assert summary.format == "completion (prompt, completion)"


def test_the_answers_of_a_chat_are_marked(look, capsys, tmp_path: Path):
    data = _write_rows(tmp_path / "rows.jsonl", _chat("hello", "good day", "and", "more"))
    run = look(data=data, train={"max_seq_len": 200}, **NO_EVAL)
    output = capsys.readouterr().out
    assert "hello<|im_end|>\n  | <|im_start|>assistant\n  | [[ good day<|im_end|> ]]\n" in output
    assert "assistant\n  | [[ more<|im_end|> ]]" in output
    assert run.recorder.summary.content.data.format == "chat (messages)"


def test_samples_and_figures_name_their_source(look, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 2), ("b\x1b[2J", 3)):
        rows = [{"prompt": "p", "completion": f" {name[0]} {i}"} for i in range(number)]
        _write_rows(tmp_path / f"{name}.jsonl", *rows)
    source = [{"path": "a.jsonl", "weight": 4}, {"path": "b\x1b[2J.jsonl", "weight": 3}]
    for _ in range(2):  # the second time, the tokens are reused
        run = look(data={"source": source, "show": 9}, **NO_EVAL)
        output = capsys.readouterr().out
        titles = [line for line in output.splitlines() if line.startswith("example ")]
        assert [title.partition(":")[0] for title in titles] == [
            *(f"example {i} of 7, from a.jsonl" for i in (1, 2, 3, 4)),
            *(f"example {i} of 7, from b\\x1b[2J.jsonl" for i in (5, 6, 7)),
        ]
        assert re.findall(r"  \| p ([ab]) ", output) == [*"aaaa", *"bbb"]
        assert re.search(
            r"examples by source +4 \(2 x 2\) of a.jsonl, 3 \(3 x 1\) of b\\x1b\[2J.jsonl\n", output
        )
        page = run.layout.data_html.read_text(encoding="utf-8")
        assert "example 7 of 7, from b\\x1b[2J.jsonl: " in page
        assert run.recorder.summary.content.data.sources[0] == {
            "source": "a.jsonl", "examples": 2, "repeats": 2.0, "used": 4,
        }  # fmt: skip


def test_samples_name_no_source_if_the_template_has_refused_some(look, capsys, tmp_path: Path):
    tool = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    data = _write_rows(tmp_path / "a.jsonl", _chat("a", "b"), tool)
    _write_rows(tmp_path / "b.jsonl", _chat("c", "d"))
    source = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    look(data=data | {"source": source, "chat_template": "gemma", "max_bad_rows": 1}, **NO_EVAL)
    output = capsys.readouterr().out
    assert "example 2 of 2: " in output
    assert ", from " not in output


def test_one_source_is_not_repeated_in_the_figures(look, capsys, tmp_path: Path):
    data = _write_rows(tmp_path / "rows.jsonl", _chat("a", "b"), _chat("c", "d"))
    run = look(data=data, **NO_EVAL)
    output = capsys.readouterr().out
    assert "examples by source" not in output
    assert "example 1 of 2: " in output
    assert "sources" not in run.recorder.summary.content.data.to_json()


def predicted(labels: list[int]) -> list[int]:
    """Return the labels of tokens that the loss predicts."""
    return [label for label in labels if label != IGNORE_INDEX]


@pytest.mark.parametrize(
    ("on_long", "expected"),
    [
        ("auto", {"truncated": 1, "dropped": 1, "split": 0, "sequences": 3}),
        ("drop", {"truncated": 0, "dropped": 2, "split": 0, "sequences": 2}),
        ("split", {"truncated": 1, "dropped": 0, "split": 1, "sequences": 4}),
    ],
)
def test_examples_that_are_too_long_are_counted_as_they_are_in_the_source(
    look, capsys, tmp_path: Path, on_long, expected
):
    """Packing arranges parts anew. The figures are about the examples before that."""
    long = " ".join(map(str, range(40)))
    rows = [
        {"prompt": "a", "completion": " b"},  # 3 tokens
        {"prompt": "a", "completion": f" {long}"},  # 60 tokens
        {"prompt": "a" * 3, "completion": f" {long[:60]}"},  # 32 tokens
        {"prompt": long, "completion": " b"},  # 60 tokens, the first 58 of which are not trained
    ]
    data = _write_rows(tmp_path / "rows.jsonl", *rows) | {"on_long": on_long}
    run = look(data=data, train={"max_seq_len": 32}, **NO_EVAL)
    found = run.recorder.summary.content.data
    tokens = task.load_training_data(run, TINY_FOLDER)
    parts, packed = tokens.parts, tokens.sequences
    _, trained = token_masks(parts, 0, len(parts.stream))
    labels = [label for sequence in packed for label in sequence["labels"].tolist()]
    assert sorted(parts.stream[trained].tolist()) == sorted(predicted(labels))
    assert found.examples == 4
    assert found.trained_tokens == packed.target_token_count
    assert found.tokens == int((packed.end - packed.begin).sum())
    assert found.sequences == len(packed)
    assert {name: getattr(found, name) for name in expected} == expected
    assert "example 4 of 4: " in capsys.readouterr().out


def test_color_needs_a_terminal(look, monkeypatch, capsys):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    colors = []
    monkeypatch.setattr(task, "render_data", lambda view, color, **_: colors.append(color) or "x")
    look()
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    look()
    assert colors == [False, True]


def test_samples_are_spread_evenly():
    assert sample_indices(100, 3) == [0, 33, 66]
    assert sample_indices(2, 3) == [0, 1]
    assert sample_indices(5, 0) == []


@pytest.mark.parametrize("trained", [slice(0, 0), slice(3, 8), slice(0, 99)])
def test_the_pieces_are_the_text(tokenizer, trained):
    text = "def f(x):\n    return 'é中\U0001f469 <|endoftext|> [[x]]'\n"
    data = _masked(pack_examples([text], tokenizer, max_seq_len=99).sequences, trained)
    sample = Sampler(data, tokenizer).sample(0, 99)
    assert "".join(piece.text for piece in sample.pieces) == f"{text}<|endoftext|>"
    assert [p.text for p in sample.pieces if p.is_special] == ["<|endoftext|>"] * 2
    kept = data.targets.copy()
    kept[0] = False
    expected = tokenizer.decode(data.stream[kept])
    assert "".join(p.text for p in sample.pieces if p.is_trained) == expected


def test_a_character_of_which_a_part_is_trained_is_shown_as_its_bytes(tokenizer):
    data = pack_examples(["中\U0001f469"], tokenizer, max_seq_len=99).sequences
    data = _masked(data, slice(1, 99, 2))
    pieces = Sampler(data, tokenizer).sample(0, 99).pieces
    assert len(pieces) == len(data.stream) > 6
    assert {piece.text for piece in pieces} == {"\ufffd", "<|endoftext|>"}


def test_a_long_example_is_shown_in_two_parts(tokenizer):
    text = "".join(f"x{number} = {number}\n" for number in range(99))
    data = pack_examples([text], tokenizer, max_seq_len=32).sequences
    tokens = len(data.stream)
    sample = Sampler(data, tokenizer).sample(0, 40)
    first, last = ("".join(p.text for p in part) for part in (sample.pieces, sample.last_pieces))
    assert sample.hidden_tokens == tokens - 40
    assert (text + "<|endoftext|>").startswith(first)
    assert (text + "<|endoftext|>").endswith(last)
    assert first == tokenizer.decode(data.stream[:30])
    assert f"split into {len(data)} parts" in sample.title


def test_the_title_says_what_is_cut_off(tokenizer):
    data = pack_examples(["a b c d e f g h i j"], tokenizer, max_seq_len=4, packing=False).sequences
    sample = Sampler(data, tokenizer).sample(0, 40)
    assert sample.title == f"example 1 of 1: {len(data.stream)} tokens, 3 trained, " + (
        f"{len(data.stream) - 4} cut off"
    )
    assert "".join(piece.text for piece in sample.pieces) == tokenizer.decode(data.stream[:4])


def test_a_token_without_text_is_named(tokenizer):
    stream = np.array([5, 10**6, 10**6 + 1], np.int32)
    one = np.array([0])
    data = TokenSequences(stream, np.array([False, True, True]), one, one, np.array([3]))
    pieces = Sampler(data, tokenizer).sample(0, 9).pieces
    assert pieces[-1].text == "<token 1000000><token 1000001>"
    assert pieces[-1].is_special


def test_a_piece_keeps_the_space_that_its_tokenizer_joins_words_with():
    class Words:
        """A tokenizer that, as SentencePiece, drops the space before the first word."""

        all_special_ids, added_tokens_decoder = [], {}

        def decode(self, ids: list[int], **_: bool) -> str:
            return " ".join(f"w{token}" for token in ids)

    zero = np.array([0])
    targets = np.array([False, False, True, True, False])
    data = TokenSequences(np.arange(5), targets, zero, zero, np.array([5]))
    pieces = Sampler(data, Words()).sample(0, 9).pieces
    assert [piece.text for piece in pieces] == ["w0 w1", " w2 w3", " w4"]


def test_the_model_of_a_look_is_its_tokenizer_and_configuration(tiny_model: Path):
    model = load_data_model(ModelConfig(name_or_path=str(tiny_model)), DataConfig())
    assert (model.folder, model.vocab_size) == (tiny_model, 4096)
    synthetic = load_data_model(
        ModelConfig(name_or_path="Meta-Llama-3-8B", source="synthetic"), DataConfig()
    )
    assert (synthetic.folder, synthetic.vocab_size) == (TINY_FOLDER, 128256)
    with pytest.raises(UserError, match="no such folder"):
        load_data_model(ModelConfig(name_or_path="./absent"), DataConfig())
