"""The task `finetune` in one process: its files, its figures, and a run that resumes."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.formats.manifest import seal
from hqqtrain.models.source import TINY_FOLDER
from hqqtrain.tasks.card_figures import card_metrics
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.inference import evaluate


def _losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_what_a_finetune_leaves(make_config, start_run):
    with start_run(make_config()) as run:
        finetune(run)
        folder = run.layout.folder
        trained = run.recorder.summary.content.train
        metrics = card_metrics(run.recorder.summary.content)
    adapter = _adapter(folder)
    assert adapter
    assert all(name.startswith("base_model.model.model.layers.0.") for name in adapter)
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert trained.steps == 2
    assert trained.trainable_parameters == sum(tensor.numel() for tensor in adapter.values())
    assert list(metrics)[:3] == [f"perplexity, {model}" for model in
                                 ("full precision", "quantized", "trained")]  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train"]["loss"] == _losses(folder)[-1]
    assert summary["quantize"]["fingerprint"] in (folder / "adapter" / "README.md").read_text()
    state = json.loads((folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert (state["strategy"], state["world_size"], state["step"]) == ("single", 1, 2)
    assert set(state["texts"]) == {"data.source", "eval.source"}


def test_the_adapters_of_a_run_name_its_quantized_base(
    make_config, start_run, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with start_run(make_config(run={"root": "runs"}, data={"chat_template": "chatml"})) as run:
        finetune(run)
    monkeypatch.chdir("/")
    folder, logits = tmp_path / "runs" / "run", []
    for adapter in (folder / "adapter", folder / "checkpoints" / "step-00000002"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (
            str(folder / "quantized"), None,
        )  # fmt: skip
        model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
        logits.append(model(torch.arange(8)[None]).logits)
    assert torch.equal(*logits)
    card = (folder / "adapter" / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card


def test_without_its_quantized_base_an_adapter_names_the_dense_model(
    make_config, start_run, tiny_model
):
    with start_run(make_config(quant={"save": False})) as run:
        finetune(run)
    config = json.loads((run.layout.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    with pytest.raises(UserError, match="trained on the quantized base"):
        AutoPeftModelForCausalLM.from_pretrained(run.layout.adapter)
    assert "did not save its quantized base" in (run.layout.adapter / "README.md").read_text()


@pytest.fixture
def run_finetune(make_config, start_run):
    """Return a function that runs `finetune` in the run directory `name` and returns its path."""

    def run_in(name: str) -> Path:
        with start_run(make_config(run={"name": name})) as run:
            finetune(run)
        return run.layout.folder

    return run_in


def test_a_resumed_run_equals_an_uninterrupted_one(run_finetune, monkeypatch, tmp_path):
    whole, folder = run_finetune("whole"), tmp_path / "runs" / "stopped"
    with monkeypatch.context() as patch:
        # The request arrives in the first step: an evaluation before it would stop at once.
        patch.setattr(RecordedEvaluation, "evaluate_as", lambda *_, **__: None)
        patch.setattr(PreemptionHandler, "stop_reason", "SIGUSR1 was received")
        with pytest.raises(PreemptedError):
            run_finetune("stopped")
    assert len(_losses(folder)) == 1
    assert not (folder / "adapter").exists()
    run_finetune("stopped")
    assert _losses(folder) == _losses(whole)
    ours, theirs = _adapter(folder), _adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _flip(file: Path, position: int) -> None:
    """Change a byte of `file`; keep its size and its modification time."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def stopped(make_config, start_run) -> Path:
    """Return the directory of a run with a checkpoint at step 2, which is extended to 3 steps."""
    with start_run(make_config()) as run:
        finetune(run)
    return run.layout.folder


@pytest.fixture
def resume(make_config, start_run):
    """Return a function that resumes the run, with one more step."""

    def resume(**groups) -> Path:
        groups.setdefault("train", {"max_steps": 3})
        with start_run(make_config(**groups)) as run:
            assert not run.recorder.history.is_done()
            finetune(run)
        return run.layout.folder

    return resume


@pytest.mark.parametrize("position", [-1, -20_000])
def test_a_run_does_not_resume_with_another_model(stopped, resume, tiny_model, position):
    """The last byte belongs to a norm, which is not part of the fingerprint."""
    _flip(tiny_model / "model.safetensors", position)
    with pytest.raises(UserError, match=r"model\.name_or_path=.*: its files are not those that"):
        resume()
    _flip(tiny_model / "model.safetensors", position)
    os.utime(tiny_model / "model.safetensors")  # restored from a backup
    assert len(_losses(resume())) == 3


def test_a_run_does_not_resume_with_other_text_of_equal_size_and_time(stopped, resume, tmp_path):
    _flip(tmp_path / "train.txt", 10)
    with pytest.raises(UserError, match=r"other text than data\.source gives now"):
        resume()


def test_a_checkpoint_of_another_configuration_is_refused(make_config, start_run, stopped, resume):
    with start_run(make_config(optim={"lr": 1.0}, run={"name": "other"})) as run:
        finetune(run)
    shutil.rmtree(stopped / "checkpoints")
    shutil.copytree(run.layout.checkpoints, stopped / "checkpoints")
    with pytest.raises(UserError, match=r"another configuration: optim\.lr=0\.01 \(saved: 1\.0\)"):
        resume()


def test_a_checkpoint_of_the_first_release_is_resumed(stopped, resume):
    (folder,) = stopped.glob("checkpoints/step-00000002")
    state = json.loads((folder / "state.json").read_text())
    del state["config"], state["model"]
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    seal(folder)
    assert len(_losses(resume())) == 3


@pytest.mark.parametrize("deleted", ["adapter", "quantized", "summary.json"])
def test_a_deleted_result_is_written_again(stopped, resume, deleted):
    path, before = stopped / deleted, _adapter(stopped)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    resume(train={"max_steps": 2})
    assert path.exists()
    after = _adapter(stopped)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_without_its_adapter_is_not_evaluated_as_its_base(make_config, start_run, stopped):
    shutil.rmtree(stopped / "adapter")
    config = make_config("eval", model={"name_or_path": str(stopped)}, run={"name": "eval"})
    with start_run(config) as run, pytest.raises(UserError, match="its adapter/ is missing"):
        evaluate(run)
    config.model.name_or_path = str(stopped / "quantized")
    with start_run(config) as run:
        evaluate(run)
        assert list(card_metrics(run.recorder.summary.content)) == ["perplexity, quantized"]


def test_an_adapter_of_another_run_is_not_evaluated(make_config, start_run, stopped):
    """Both were trained on the same quantized base, so the fingerprint does not tell them apart."""
    with start_run(make_config(optim={"lr": 1.0}, run={"name": "other"})) as run:
        finetune(run)
    shutil.rmtree(stopped / "adapter")
    shutil.copytree(run.layout.adapter, stopped / "adapter")
    config = make_config("eval", model={"name_or_path": str(stopped)}, run={"name": "eval"})
    with start_run(config) as run, pytest.raises(UserError, match="is not what the run has writ"):
        evaluate(run)


@pytest.mark.parametrize("name", [".lock", "status.json", "metrics.jsonl", "checkpoints", "report"])
def test_planted_links_in_the_run_directory_are_refused(stopped, resume, tmp_path, name):
    path = stopped / name
    (tmp_path / "victim").mkdir()
    if path.is_file():
        path.rename(tmp_path / "victim" / name)
        path.symlink_to(tmp_path / "victim" / name)
    else:
        shutil.rmtree(path, ignore_errors=True)
        path.symlink_to(tmp_path / "victim")
    before = {file: file.read_bytes() for file in (tmp_path / "victim").iterdir()}
    with pytest.raises(UserError, match=rf"{name}: is a symbolic link"):
        resume()
    assert {file: file.read_bytes() for file in (tmp_path / "victim").iterdir()} == before


def test_a_private_file_behind_a_link_is_not_copied(make_config, start_run, tiny_model, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tiny_model / "vocab.txt").symlink_to(tmp_path / "secret")
    with start_run(make_config()) as run, pytest.raises(UserError, match=r"vocab\.txt: is a link"):
        finetune(run)
    assert not (tmp_path / "runs" / "run" / "quantized").exists()


def test_a_model_that_cannot_pack_trains_as_without_packing(make_config, start_run, tmp_path):
    """Its texts do not see each other, so the losses of both settings are equal."""
    torch.manual_seed(0)
    opt = OPTConfig(
        vocab_size=4096, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0, init_std=0.3,
    )  # fmt: skip
    model = tmp_path / "opt"
    OPTForCausalLM(opt).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((TINY_FOLDER / name).read_bytes())
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):  # together as long as one sequence
        (texts / f"{number}.txt").write_text(f"x = {number}")
    losses = {}
    for packing in (True, False):
        config = make_config(
            model={"name_or_path": str(model)},
            data={"source": str(texts)},
            train={"packing": packing, "global_batch_size": 1 if packing else 3},
            run={"name": f"packing_{packing}"},
        )
        with start_run(config) as run:
            finetune(run)
        losses[packing] = _losses(run.layout.folder)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


OVERSHOOTS = {
    "optim": {"lr": 100.0, "schedule": "constant"},
    "eval": {"every": 1},
    "train": {"max_steps": 6, "seed": 2},
}
"""A learning rate with which the held-out loss gets worse after the first step, by 0.03."""


def _summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def _eval_losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["train/global_step"]: row["eval/loss"] for row in rows if "eval/loss" in row}


def test_the_best_checkpoint_is_the_result(make_config, start_run):
    with start_run(make_config(ckpt={"load_best": True, "keep_last": 1}, **OVERSHOOTS)) as run:
        finetune(run)
    folder, summary = run.layout.folder, _summary(run.layout.folder)
    losses, train = _eval_losses(folder), summary["train"]
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best < 6, "the learning rate must be high enough for the last step not to be the best"
    assert (train["steps"], train["best_step"], train["adapter_step"]) == (6, best, best)
    assert train["best_eval_loss"] == losses[best]
    assert summary["eval"]["final"]["perplexity"] == pytest.approx(math.exp(losses[best]))
    checkpoint = load_file(folder / train["best_checkpoint"] / "adapter_model.safetensors")
    adapter = _adapter(folder)
    assert adapter.keys() == checkpoint.keys()
    assert all(torch.equal(adapter[name], checkpoint[name]) for name in adapter)
    assert f"after optimizer step {best}" in (folder / "adapter" / "README.md").read_text()
    # The curves show the training, whose last point is that of the last step.
    assert losses[6] > losses[best]


def test_without_load_best_the_best_step_is_named_only(make_config, start_run):
    with start_run(make_config(**OVERSHOOTS)) as run:
        finetune(run)
    folder, summary = run.layout.folder, _summary(run.layout.folder)
    losses, train = _eval_losses(folder), summary["train"]
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert (train["best_step"], train["adapter_step"]) == (best, 6)
    assert ("best_checkpoint" in train) == (folder / f"checkpoints/step-{best:08}").exists()
    assert summary["eval"]["final"]["perplexity"] == pytest.approx(math.exp(losses[6]))


def test_training_that_stops_early_says_so_and_resumes_to_the_same_result(
    make_config, start_run, monkeypatch
):
    def run_in(name: str) -> Path:
        groups = {**OVERSHOOTS, "train": {"max_steps": 30, "early_stopping_patience": 3}}
        with start_run(make_config(ckpt={"load_best": True}, run={"name": name}, **groups)) as run:
            finetune(run)
        return run.layout.folder

    whole = run_in("whole")
    with monkeypatch.context() as patch:
        # The request arrives after the training, in the evaluation of the last model.
        patch.setattr("hqqtrain.tasks.finetune.evaluate_trained", _raise_preempted)
        with pytest.raises(PreemptedError):
            run_in("stopped")
    stopped = run_in("stopped")
    for folder in (whole, stopped):
        train = _summary(folder)["train"]
        assert train["steps"] == train["best_step"] + 3 < 30
        assert train["adapter_step"] == train["best_step"]
        assert train["stopped_early"].startswith(f"stopped early after step {train['steps']}: ")
        status = json.loads((folder / "status.json").read_text())
        assert (status["status"], status["cause"]) == ("done", train["stopped_early"])
    ours, theirs = _adapter(stopped), _adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert _losses(stopped) == _losses(whole)


def _raise_preempted(*_: object) -> None:
    raise PreemptedError("SIGUSR1 was received")
