"""The text of `quant.calibration` is spread over its source, and names what is made from it."""

import json
from pathlib import Path

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks.calibration import load_calibration, packed_weights_digest
from hqqtrain.tasks.datasets import batch_layout
from hqqtrain.tasks.finetune import load_texts
from hqqtrain.tasks.inference import evaluate, quantize
from hqqtrain.tasks.model import load_or_quantize, plan_settings

QUANT = {"solver": "gptq", "calibration": "auto", "calibration_tokens": 640}


@pytest.fixture
def calibrate(start_run):
    """Return a function that returns the calibration text of a configuration."""

    def calibrate(config: RunConfig) -> Calibration | None:
        with start_run(config) as run:
            return load_calibration(run, plan_model(plan_settings(config), run.runtime))

    return calibrate


@pytest.mark.parametrize("task", ["quantize", "finetune", "eval"])
def test_every_task_has_the_same_text(make_config, calibrate, task: str):
    found = calibrate(make_config(task, quant=QUANT))
    expected = calibrate(make_config("quantize", quant=QUANT, run={"name": "other"}))
    assert found.sequences.shape == (3, 64)  # the tiny model has 64 positions, the text 213 tokens
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.sequences.unique(dim=0)) == 3


def test_another_source(make_config, calibrate, tmp_path: Path):
    (tmp_path / "own.txt").write_text("alpha beta gamma " * 3000)
    own = calibrate(make_config(quant=QUANT | {"calibration": str(tmp_path / "own.txt")}))
    of_training = calibrate(make_config(quant=QUANT, run={"name": "other"}))
    assert own.digest != of_training.digest
    digests = {packed_weights_digest("sha256:1", text) for text in (own, of_training, None)}
    assert len(digests) == 3
    assert packed_weights_digest("sha256:1", None) == "sha256:1"


def test_the_length_of_the_sequences_does_not_matter(make_config, calibrate, tmp_path: Path):
    chat = [{"role": "user", "content": "alpha beta"}, {"role": "assistant", "content": "gamma"}]
    row = json.dumps({"messages": chat})
    (tmp_path / "chat.jsonl").write_text("\n".join([row] * 60))
    data = {"source": str(tmp_path / "chat.jsonl"), "chat_template": "chatml"}
    found = [
        calibrate(
            make_config(
                quant=QUANT, data=data, eval={"source": None}, train={"max_seq_len": length},
                run={"name": f"of{length}"},
            )
        )
        for length in (32, 64)
    ]  # fmt: skip
    assert found[0].digest == found[1].digest


def test_a_short_text_is_one_sequence(make_config, start_run, tmp_path: Path, capfd):
    (tmp_path / "short.txt").write_text("alpha beta")
    quant = QUANT | {"calibration": str(tmp_path / "short.txt"), "nbits": 2}
    config = make_config("quantize", quant=quant, eval={"source": None})
    with start_run(config) as run:
        plan = plan_model(plan_settings(config), run.runtime)
        calibration = load_calibration(run, plan)
        loaded = load_or_quantize(run, plan, calibration=calibration)
    assert 1 <= calibration.sequences.shape[1] < 10
    assert len(calibration.sequences) == 1
    assert f"{calibration.sequences.shape[1]} tokens are few" in capfd.readouterr().err
    assert all(scale.isfinite().all() for name, scale in loaded.model.named_parameters()
               if name.endswith("scale"))  # fmt: skip


@pytest.mark.parametrize("quant", [
    {"calibration": None, "solver": "least_squares"}, {"calibration": "auto", "solver": "hqq"},
])  # fmt: skip
def test_without_calibration_no_text_is_read(make_config, calibrate, quant: dict):
    assert calibrate(make_config("quantize", quant=quant)) is None


def test_the_text_decides_whether_quantized_can_be_reused(make_config, start_run, tmp_path: Path):
    (tmp_path / "own.txt").write_text("alpha beta gamma " * 3000)
    quant = QUANT | {"calibration": str(tmp_path / "own.txt")}

    def load():
        config = make_config("quantize", quant=quant)
        with start_run(config) as run:
            plan = plan_model(plan_settings(config), run.runtime)
            return load_or_quantize(run, plan, calibration=load_calibration(run, plan))

    first, again = load(), load()
    assert again.bytes_read < first.bytes_read
    (tmp_path / "own.txt").write_text("delta epsilon zeta " * 3000)
    changed = load()
    assert changed.bytes_read == first.bytes_read
    assert changed.settings.fingerprint != first.settings.fingerprint == again.settings.fingerprint


def test_the_task_quantize_calibrates(make_config, start_run, tmp_path: Path):
    errors = {}
    for solver, calibration in (("least_squares", None), ("gptq", "auto")):
        quant = QUANT | {"solver": solver, "calibration": calibration, "nbits": 2}
        config = make_config("quantize", quant=quant, run={"name": solver})
        with start_run(config) as run:
            quantize(run)
            assert run.recorder.summary.content.quantize.calibration == (
                calibration and str(run.config.data.source)
            )
            errors[solver] = run.recorder.summary.content.quantize.relative_error
    # Feedback lowers the error of the outputs, at the price of that of the weights.
    assert errors["gptq"] > errors["least_squares"]


def test_a_text_of_its_own_is_used_as_a_whole_and_not_trained_on(
    make_config, calibrate, tmp_path: Path, capfd
):
    row = {"messages": [{"role": r, "content": "alpha beta"} for r in ("user", "assistant")]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))  # a single row, which has no other part
    quant = QUANT | {"calibration": str(tmp_path / "chat.jsonl")}
    data = {"chat_template": "chatml"}
    assert calibrate(make_config(quant=quant, data=data)) is not None
    log = capfd.readouterr().err
    assert "chat.jsonl: the text is read as that of data.source would be" in log
    assert "1 sequence of " in log
    assert "tokens are trained" not in log


def test_a_text_that_is_measured_is_refused(make_config, start_run, tmp_path: Path):
    (tmp_path / "own.txt").write_text("one two three four five six seven eight nine ten " * 2)
    own = str(tmp_path / "own.txt")
    config = make_config("eval", quant=QUANT | {"calibration": own}, eval={"source": own})
    with start_run(config) as run, pytest.raises(UserError) as error:
        evaluate(run)
    assert str(error.value).startswith(f"eval.source={own}, quant.calibration={own}: ")
    assert "with the calibration text" in str(error.value)


def test_a_training_reads_its_text_once(make_config, start_run, capfd):
    config = make_config(quant=QUANT)
    with start_run(config) as run:
        plan = plan_model(plan_settings(config), run.runtime)
        layout = batch_layout(config, plan, run.runtime.comm)
        loader, _, _, calibration = load_texts(run, plan, layout, checkpoint=None)
        loader.close()
    assert calibration is not None
    assert capfd.readouterr().err.count("/tokens/train-") == 1
