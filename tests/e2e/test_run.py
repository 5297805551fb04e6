"""Fine-tuning of the bundled model on the command line: the files it leaves, and its figures."""

import json
import shutil
from pathlib import Path

import pytest
from runs import QUICK, Finished, launch, run
from safetensors.torch import load_file, save_file

RECIPE = (
    "recipe=tiny_2bit",
    "train.max_steps=10",
    "train.max_seq_len=64",
    "eval.samples=1",
    "eval.tokens=2048",
    "quant.calibration_tokens=1024",
)
"""The default recipe with fewer steps and tokens: 17 seconds on one core."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = launch(*RECIPE, root=tmp_path_factory.mktemp("run") / "runs")
    assert done.code == 0, done.output
    return done


def test_summary_is_schema_1(finished: Finished):
    summary = finished.summary
    assert summary["schema"] == 1
    assert {k: type(v) for k, v in summary["run"].items()} == {
        "name": str, "recipe": str, "task": str, "strategy": str, "world_size": int,
        "device": str, "versions": dict,
    }  # fmt: skip
    assert set(summary["quantize"]) == {
        "nbits", "group_size", "axis", "solver", "bits_per_weight", "relative_error", "seconds",
        "weights", "source_bytes", "bytes_read", "peak_memory_gib", "fingerprint", "calibration",
        "calibration_tokens",
    }  # fmt: skip
    assert set(summary["train"]) == {
        "steps", "tokens", "seconds", "tokens_per_second", "peak_memory_gib",
        "trainable_parameters", "loss",
    }  # fmt: skip
    measured = summary["eval"]
    assert {"dataset", "tokens", "full_precision", "quantized", "final"} <= set(measured)
    assert set(measured["final"]) == {"perplexity", "kl", "top1_agreement"}
    assert summary["quantize"]["bits_per_weight"] == 2.5
    assert summary["quantize"]["bytes_read"] == summary["quantize"]["source_bytes"]


def test_loading_statistics_are_reported_by_rank(finished: Finished):
    (rank,) = json.loads((finished.directory / "loading.json").read_text())["ranks"]
    assert rank["rank"] == 0
    assert rank["bytes_read"] == finished.summary["quantize"]["bytes_read"]
    assert 0 < rank["read_seconds"] < rank["seconds"]
    assert 0.05 < rank["host_peak_gib"] < 4
    assert rank["device_peak_gib"] == 0
    assert "rank 0: loaded 0.0" in finished.output
    assert "GB/s; reading took" in finished.output


def test_training_recovers_perplexity(finished: Finished):
    measured = finished.summary["eval"]
    full, quantized, final = (
        measured[k]["perplexity"] for k in ("full_precision", "quantized", "final")
    )
    assert 1 < full < final < quantized
    assert (quantized - final) / (quantized - full) > 0.25
    assert measured["final"]["kl"] < measured["quantized"]["kl"] * 0.9


def test_the_run_directory_has_all_documented_files(finished: Finished):
    names = {path.name for path in finished.directory.iterdir()}
    assert {
        "config.yaml", "summary.json", "metrics.jsonl", "status.json", "quantized", "adapter",
        "report", "wandb",
    } <= names  # fmt: skip
    status = json.loads((finished.directory / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("done", 0)
    plots = ["loss", "perplexity", "layers", "learning_rate", "grad_norm", "tokens_per_second"]
    # W&B, the default of track.backends, shows PNG only.
    assert {path.name for path in (finished.directory / "report").iterdir()} == {
        "index.html", *(f"{name}.svg" for name in [*plots, "peak_gib"]),
        *(f"{name}.png" for name in plots[:3]),
    }  # fmt: skip
    page = (finished.directory / "report" / "index.html").read_text()
    for words in ("done · ", "Hyper-parameters", "Continuations of held-out text", ">trained</h3>"):
        assert words in page
    steps = [line for line in finished.metrics if "train/loss" in line]
    assert [line["train/global_step"] for line in steps] == list(range(1, 11))
    assert {
        "train/loss", "train/grad_norm", "train/learning_rate", "train/epoch",
        "train/tokens_per_second", "train/all_tokens_per_second", "memory/peak_gib",
    } <= set(steps[0])  # fmt: skip
    layers = [k for line in finished.metrics for k in line if k.startswith("quant/relative_error/")]
    assert len(layers) == 42
    assert "perplexity" in finished.output


def test_the_same_command_reports_that_the_run_is_done(finished: Finished):
    before = (finished.directory / "summary.json").stat().st_mtime_ns
    again = run(*RECIPE, root=finished.root)
    assert again.code == 0
    assert "done already" in again.output
    assert (finished.directory / "summary.json").stat().st_mtime_ns == before


def test_other_settings_use_another_run_directory(finished: Finished, tmp_path: Path):
    other = run(*RECIPE, "task=quantize", "quant.nbits=3", root=tmp_path / "runs")
    assert other.code == 0, other.output
    assert other.directory.name != finished.directory.name
    assert other.summary["quantize"]["bits_per_weight"] == 3.5
    assert "eval" not in other.summary
    assert "train" not in other.summary


def test_eval_of_a_finished_run_gives_the_same_figures(finished: Finished, tmp_path: Path):
    words = ("task=eval", f"model.name_or_path={finished.directory}", RECIPE[-1])
    done = run(*words, RECIPE[2], "train.micro_batch_size=8", "track.backends=[]",
               root=tmp_path / "runs")  # fmt: skip
    assert done.code == 0, done.output
    assert done.summary["quantize"]["fingerprint"] == finished.summary["quantize"]["fingerprint"]
    for part in ("quantized", "final"):
        expected = finished.summary["eval"][part]["perplexity"]
        assert done.summary["eval"][part]["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_an_altered_quantized_folder_is_refused(finished: Finished, tmp_path: Path):
    altered = Path(shutil.copytree(finished.directory / "quantized", tmp_path / "altered"))
    tensors = load_file(altered / "model.safetensors")
    tensors["model.layers.4.mlp.down_proj.W_q"][17, 3] ^= 1
    save_file(tensors, altered / "model.safetensors", {"format": "pt"})
    done = run("task=eval", f"model.name_or_path={altered}", root=tmp_path / "runs")
    assert done.code == 2, done.output
    assert "altered" in done.output
    assert not (tmp_path / "runs").exists()


def test_adapter_files_are_stock_peft(finished: Finished):
    state = load_file(finished.directory / "adapter" / "adapter_model.safetensors")
    assert len(state) == 2 * 42
    assert all(k.startswith("base_model.model.model.layers.") for k in state)
    config = json.loads((finished.directory / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_training_starts_from_an_adapter(finished: Finished, tmp_path: Path):
    start = f"adapter.init_from={finished.directory / 'adapter'}"
    base = f"model.name_or_path={finished.directory / 'quantized'}"
    words = (*QUICK, base, "train.max_steps=1", "eval.source=null")
    fresh = run(*words, root=tmp_path / "fresh" / "runs")
    done = run(*words, start, root=tmp_path / "runs")
    assert (fresh.code, done.code) == (0, 0), fresh.output + done.output
    assert done.losses()[0] < fresh.losses()[0] - 0.5, "the same batch"
    other = run(*words, start, "adapter.alpha=8", root=tmp_path / "other" / "runs")
    assert other.code == 2
    assert "lora_alpha=64" in other.output
