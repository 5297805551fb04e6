"""A chat fine-tuning by one command, also killed and resumed on two ranks: the same bits."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from runs import SMALL, Finished, run
from safetensors.torch import load_file

STEPS = 8


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the command line of two epochs on 48 chats, one of which trains nothing."""
    file = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus {number}?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
        }
        for number in range(47)
    ]
    rows.append({"messages": [{"role": "user", "content": "No answer."}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        *(word for word in SMALL if not word.startswith(("data.", "eval.source"))),
        f"data.source={file}", "data.chat_template=chatml", "data.add_tokens=auto",
        "adapter.modules_to_save=[norm]", "data.validation=0.1", "run.name=run",
        f"train.max_steps={STEPS}", "train.max_seq_len=128", "train.precision=fp32", "ckpt.every=2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: tuple, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = run(*words, root=tmp_path_factory.mktemp("whole") / "runs")
    assert done.code == 0, done.output
    return done


def test_the_log_says_what_is_trained(whole: Finished):
    assert "48 rows of chat (messages)" in whole.output
    figures = r"([\d,]+) examples; ([\d,]+) of ([\d,]+) tokens are trained"
    (line,) = re.findall(figures, whole.output)
    examples, trained, tokens = (int(number.replace(",", "")) for number in line)
    assert 40 <= examples < 48
    assert 0 < trained < tokens / 2
    assert whole.summary["train"]["loss"] > 0
    assert whole.summary["eval"]["final"]["perplexity"] > 1


def test_an_example_that_trains_nothing_is_left_out_with_a_warning(words: tuple, tmp_path: Path):
    done = run(*words, "task=data", "eval.source=null", root=tmp_path / "runs")
    assert done.code == 0, done.output
    data = done.summary["data"]
    assert (data["examples"], data["dropped"]) == (48, 1)


def test_a_chat_that_the_template_refuses_is_named_by_its_line(words: tuple, tmp_path: Path):
    done = run(*words, "data.chat_template=gemma", root=tmp_path / "runs")
    assert done.code == 0, done.output
    file = tmp_path / "odd.jsonl"
    odd = {"messages": [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "5"}]}
    file.write_text(json.dumps(odd) + "\n")
    refused = run(*words, f"data.source={file}", "data.chat_template=gemma", "eval.source=null",
                  root=tmp_path / "refused")  # fmt: skip
    assert refused.code == 2
    assert "odd.jsonl, line 1: " in refused.output
    assert "the roles system, user and assistant" in refused.output
    assert "Traceback" not in refused.output


def test_a_killed_run_on_two_ranks_ends_with_the_same_bits(
    words: tuple, whole: Finished, tmp_path: Path
):
    root = tmp_path / "runs"

    def kill(pids: list[int]) -> None:
        metrics, end = root / "run" / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("train/loss") < 5:
            assert time.monotonic() < end, "the run did not reach this step"
            time.sleep(0.005)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    two = run(*words, root=tmp_path / "two" / "runs", processes=2)
    assert two.code == 0, two.output
    assert run(*words, root=root, processes=2, meanwhile=kill).code == -signal.SIGKILL
    resumed = run(*words, root=root, processes=2)
    assert resumed.code == 0, resumed.output
    assert "resuming from" in resumed.output
    assert _adapter(resumed) == _adapter(two)
    assert resumed.losses() == two.losses()
    assert two.losses() == pytest.approx(whole.losses(), rel=1e-4)
    assert two.summary["train"]["tokens"] == whole.summary["train"]["tokens"]


def _adapter(done: Finished) -> dict[str, bytes]:
    tensors = load_file(done.directory / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
