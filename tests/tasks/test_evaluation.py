"""The evaluation of a run: with and without the adapter, and each result in the record."""

import json
from pathlib import Path

import pytest
import torch

from hqqtrain.evaluation.perplexity import evaluate_perplexity
from hqqtrain.loading.model_builder import RunnableModel, wrap_for_execution
from hqqtrain.loading.plan import plan_model
from hqqtrain.models.families.structure import output_head
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import load_held_out_data
from hqqtrain.tasks.evaluation import RecordedEvaluation, _decode
from hqqtrain.tasks.model import load_or_quantize, plan_settings
from hqqtrain.tracking.composite import CompositeTracker


def _runnable(run: Run) -> RunnableModel:
    plan = plan_model(plan_settings(run.config), run.runtime)
    return wrap_for_execution(load_or_quantize(run, plan), run.runtime.strategy)


@pytest.mark.parametrize("reference", ["resident", "off"])
def test_both_parts_are_recorded(make_config, start_run, reference: str):
    with start_run(make_config(eval={"reference": reference})) as run:
        runnable = _runnable(run)
        held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
        evaluation = RecordedEvaluation(run, runnable, held_out)
        evaluation.evaluate_as("quantized", adapted=False)
        for name, param in runnable.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param)
        evaluation.evaluate_as("final", adapted=True)
        loss = evaluation.evaluate_during_training()
        recorded = run.recorder.summary.content.eval
        expected = evaluate_perplexity(runnable.model, held_out, run.runtime.comm, batch_size=1)
    assert recorded.final.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert loss == pytest.approx(expected.loss, rel=1e-5)
    assert recorded.final.perplexity != pytest.approx(recorded.quantized.perplexity, rel=1e-3)
    if reference == "off":
        assert (recorded.full_precision, recorded.final.kl, recorded.bytes_read) == (
            None,
            None,
            None,
        )
    else:
        assert recorded.final.kl > recorded.quantized.kl > 0
        assert recorded.bytes_read == runnable.plan.reader.total_bytes


def test_without_a_held_out_set_nothing_is_measured(make_config, start_run):
    with start_run(make_config(eval={"source": None})) as run:
        evaluation = RecordedEvaluation(run, _runnable(run), None)
        evaluation.evaluate_as("quantized", adapted=False)
        assert evaluation.evaluate_during_training() is None
        evaluation.record_samples()
        assert run.recorder.samples == ()
        assert run.recorder.summary.content.eval is None


@pytest.mark.parametrize("reference", ["resident", "off"])
def test_each_model_continues_the_same_texts(make_config, start_run, reference: str):
    with start_run(make_config(eval={"reference": reference})) as run:
        runnable = _runnable(run)
        held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
        evaluation = RecordedEvaluation(run, runnable, held_out)
        evaluation.record_samples()
        # A fresh adapter changes nothing.
        (sample,) = run.recorder.samples
        assert sample.continuations["trained"] == sample.continuations["quantized"]
        for name, param in runnable.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param)
        evaluation.record_samples()
        first, (sample,) = sample, run.recorder.samples
    expected = ["held-out text", "full precision", "quantized", "trained"]
    assert list(sample.continuations) == [
        n for n in expected if n != "full precision" or reference != "off"
    ]
    assert sample.continuations["quantized"] == first.continuations["quantized"]
    assert sample.continuations["trained"] != first.continuations["trained"]
    text = Path(run.config.eval.source).read_text()
    assert text.startswith(sample.prompt + sample.continuations["held-out text"])


def test_joined_texts_are_measured_and_continued(
    make_config, tiny_model, start_run, tmp_path, monkeypatch
):
    config = json.loads((tiny_model / "config.json").read_text()) | {
        "max_position_embeddings": 1024
    }
    (tiny_model / "config.json").write_text(json.dumps(config))
    text = "\n".join(f"def held_out_{number}(x): return x * {number}" for number in range(120))
    (tmp_path / "held_out.txt").write_text(text)
    config, started = make_config(eval={"protocol": "hqq", "tokens": 1600, "samples": 2}), []
    monkeypatch.setattr(
        "hqqtrain.tasks.recorder.open_trackers",
        lambda track, folder, settings, step: started.append(settings) or CompositeTracker([]),
    )
    with start_run(config) as run:
        runnable = _runnable(run)
        held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
        evaluation = RecordedEvaluation(run, runnable, held_out)
        evaluation.evaluate_as("quantized", adapted=False)
        evaluation.record_samples()
    recorded = run.recorder.summary.content.eval
    assert (recorded.protocol, recorded.context, recorded.stride) == ("hqq", 1024, 512)
    assert recorded.tokens == 1535
    assert recorded.quantized.kl > 0
    assert 0 < recorded.quantized.top1_agreement < 1
    assert [settings["eval"]["context"] for settings in started] == [1024]  # W&B gets them
    (sample,) = run.recorder.samples  # the first two windows begin with the same text
    assert text.startswith(sample.prompt + sample.continuations["held-out text"])


@pytest.mark.parametrize(("tokens", "length"), [(2, 32), (64, 2)])
def test_the_shortest_texts_still_have_a_beginning(make_config, start_run, tokens, length):
    config = make_config(eval={"tokens": tokens}, train={"max_seq_len": length})
    with start_run(config) as run:
        runnable = _runnable(run)
        held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
        RecordedEvaluation(run, runnable, held_out).record_samples()
        assert run.recorder.samples


def test_the_end_of_a_text_ends_its_continuation():
    class Tokenizer:
        def decode(self, tokens):
            return tokens

    assert _decode(Tokenizer(), [1, 2, 9, 3], {9}) == "[1, 2]"
    assert _decode(Tokenizer(), [9, 2, 3], {9}) == "[9, 2, 3]"
    assert _decode(Tokenizer(), [1, 2, 9, 3], set()) == "[1, 2, 9, 3]"
    assert _decode(Tokenizer(), [1, 2, 9, 3], set(), (", 9", "8", ", 2")) == "[1"


@pytest.mark.parametrize("add_tokens", ["auto", None])
def test_a_prompt_of_a_chat_ends_with_the_header_of_the_assistant(
    make_config, start_run, tmp_path, add_tokens
):
    turns = [("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "22.")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat))
    data = {"chat_template": "chatml", "add_tokens": add_tokens}
    config = make_config(
        data=data, eval={"source": str(tmp_path / "chats.jsonl"), "reference": "off"},
        train={"max_seq_len": 64 if add_tokens else 256},
    )  # fmt: skip
    with start_run(config) as run:
        runnable = _runnable(run)
        held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
        RecordedEvaluation(run, runnable, held_out).record_samples()
    (sample,) = run.recorder.samples
    assert sample.prompt == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert sample.continuations["held-out text"] == "22."
    assert sample.is_chat


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_get_a_warning(make_config, start_run, caplog, value):
    with start_run(make_config(eval={"reference": "off"})) as run:
        runnable = _runnable(run)
        held_out = load_held_out_data(run, runnable.plan.source.tokenizer)
        evaluation = RecordedEvaluation(run, runnable, held_out)
        evaluation.evaluate_as("quantized", adapted=False)
        assert "held-out text is" not in caplog.text
        output_head(runnable.model).weight.data.fill_(value)
        evaluation.evaluate_as("quantized", adapted=False)
        evaluation.evaluate_during_training()
    warnings = [text for text in caplog.messages if "held-out text is" in text]
    models = [text.split(" model: the perplexity on the held-out text is ")[0] for text in warnings]
    assert models == ["quantized", "trained"]
    assert all("its figures mean nothing" in text for text in warnings)
