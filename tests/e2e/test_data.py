"""`task=data` from the command line: hostile text, several ranks, and --check."""

import json
from pathlib import Path

from runs import SMALL, run

HOSTILE = "\x1b[31mred\x1b[0m [[ x ]] <script>alert(1)</script> \\x1b \u202e <|endoftext|>\r\nend"


def test_hostile_text_is_shown_and_does_no_harm(tmp_path: Path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n}: {HOSTILE}"}) + "\n" for n in range(5)))
    done = run(
        *SMALL, f"data.source={data}", "eval.source=null", "task=data", root=tmp_path / "runs"
    )
    assert done.code == 0, done.output
    assert "\x1b" not in done.output
    shown = r"\x1b[31mred\x1b[0m [[ x ]] <script>alert(1)</script> \\x1b \u202e <|endoftext|>\x0d"
    assert f"  | 0: {shown}\n  | end<|endoftext|>\n" in done.output
    page = (done.directory / "report" / "data.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert done.summary["data"]["examples"] == 5


def test_two_ranks_show_the_data_once(tmp_path: Path):
    done = run(*SMALL, "task=data", "data.show=1", root=tmp_path / "runs", processes=2)
    assert done.code == 0, done.output
    assert done.output.count("tokens per example") == 1
    assert done.output.count("example 1 of 1") == 1


def test_check_needs_no_weights(tmp_path: Path):
    (tmp_path / "model").mkdir()
    model = next(word for word in SMALL if word.startswith("model.")).partition("=")[2]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((Path(model) / name).read_bytes())
    words = [*SMALL, f"model.name_or_path={tmp_path / 'model'}", "task=data", "--check"]
    done = run(*words, "run.name=mine", root=tmp_path / "runs")
    assert done.code == 0, done.output
    assert "(its tokenizer)" in done.output
    assert "mine-data" in done.output
    assert run(*words, "task=quantize", root=tmp_path / "runs").code == 2


def test_the_chats_of_the_tiny_recipe_fit_and_train_their_answers(tmp_path: Path):
    done = run("recipe=tiny_chat", "task=data", "data.show=1", root=tmp_path / "runs")
    assert done.code == 0, done.output
    found = done.summary["data"]
    assert 150 < found["examples"] < 1000
    assert 0.2 < found["trained_tokens"] / found["tokens"] < 0.5
    assert (found["truncated"], found["dropped"], found["untrained"]) == (0, 0, 0)
    assert found["padding"] < 0.2
    assert "<|im_start|>assistant\n  | [[ " in done.output
