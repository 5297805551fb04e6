"""The tasks without training: quantize, eval and export."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.loading.model_builder import wrap_for_execution
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks.export import export
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.inference import evaluate, quantize
from hqqtrain.tasks.model import load_or_quantize, plan_settings
from hqqtrain.tasks.resources import workload_of

TASKS = {"finetune": finetune, "quantize": quantize, "eval": evaluate, "export": export}


@pytest.fixture
def run_task(make_config, start_run, tmp_path: Path):
    """Return a function that runs a task in a new run directory and returns the run."""

    def run_task(task: str, **groups: dict):
        name = f"{task}-{len(list(tmp_path.glob('runs/*')))}"
        config: RunConfig = make_config(task, **groups | {"run": {"name": name}})
        with start_run(config) as run:
            TASKS[task](run)
        return run

    return run_task


@pytest.fixture
def trained(run_task) -> Path:
    return run_task("finetune", eval={"source": None}).layout.folder


def test_quantize_saves_the_packed_model(run_task):
    run = run_task("quantize")
    settings, summary = read_quantized_settings(run.layout.quantized), run.recorder.summary.content
    assert settings.fingerprint == summary.quantize.fingerprint
    assert len(settings.modules) == 7
    assert (summary.eval, summary.train) == (None, None)
    assert not run.layout.adapter.exists()


def test_quantize_says_that_it_leaves_an_adapter_out(run_task, trained: Path, caplog):
    with caplog.at_level(logging.INFO):
        run_task("quantize", model={"name_or_path": str(trained)})
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert f"without the adapter in {trained / 'adapter'}" in warning
    assert "starting from" not in caplog.text


def test_eval_measures_a_model_and_writes_no_weights(run_task):
    run = run_task("eval")
    assert set(run.recorder.summary.content.measured_models()) == {"full_precision", "quantized"}
    assert not run.layout.quantized.exists()


def test_eval_of_a_run_measures_its_adapter_too(run_task, trained: Path):
    run = run_task("eval", model={"name_or_path": str(trained)})
    models = run.recorder.summary.content.measured_models()
    assert set(models) == {"quantized", "final"}
    assert models["quantized"].perplexity != models["final"].perplexity
    assert run.recorder.summary.content.quantize.relative_error is None  # not measured again
    rows = {row.model: row for row in run.recorder.summary.table_rows()}
    base, adapted = rows["quantized"], rows["trained"]
    lora = sum(x.numel() for x in load_file(trained / "adapter/adapter_model.safetensors").values())
    assert adapted.bits_per_weight == base.bits_per_weight > 4
    assert adapted.gib == pytest.approx(base.gib + 4 * lora / 2**30)


def test_eval_has_the_bits_that_the_training_measured(run_task):
    """The training evaluates after its steps and other evaluations, task=eval in a fresh model."""
    run = run_task("finetune", eval={"every": 1})
    measured = run.recorder.summary.content.measured_models()
    again = run_task("eval", model={"name_or_path": str(run.layout.folder)})
    models = again.recorder.summary.content.measured_models()
    assert models["final"].perplexity == measured["final"].perplexity
    assert models["quantized"].perplexity == measured["quantized"].perplexity


def test_eval_without_an_adapter_has_no_row_for_one(run_task):
    rows = [row.model for row in run_task("eval").recorder.summary.table_rows()]
    assert rows == ["full precision", "quantized"]


def test_export_merges_the_adapter(run_task, trained: Path):
    run = run_task("export", model={"name_or_path": str(trained)})
    merged = AutoModelForCausalLM.from_pretrained(run.layout.export, dtype=torch.float32)
    base = run_task("export", model={"name_or_path": str(trained / "quantized")})
    plain = AutoModelForCausalLM.from_pretrained(base.layout.export, dtype=torch.float32)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(merged(tokens).logits, plain(tokens).logits)


def test_a_packed_export_has_the_adapter_beside_the_base(run_task, trained: Path):
    packed = {"format": "packed"}
    run = run_task("export", model={"name_or_path": str(trained)}, export=packed)
    ours, theirs = (
        read_quantized_settings(run.layout.export),
        read_quantized_settings(trained / "quantized"),
    )
    assert ours == theirs
    assert (run.layout.export / "adapter" / "adapter_model.safetensors").is_file()


def test_only_a_training_uses_trackers(run_task, trained: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("a tracker was started")

    monkeypatch.setattr("hqqtrain.tracking.composite.WandbTracker", fail)
    monkeypatch.setattr("hqqtrain.tracking.composite.TensorBoardTracker", fail)
    track = {"backends": ["wandb", "tensorboard"]}
    for task in ("quantize", "eval", "export"):
        run = run_task(task, model={"name_or_path": str(trained)}, track=track)
        assert run.layout.metrics_jsonl.exists()


def test_an_export_says_what_it_wrote(run_task, trained: Path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("an empty report was written")

    monkeypatch.setattr("hqqtrain.tasks.finalize.write_report", fail)
    run = run_task("export", model={"name_or_path": str(trained)})
    exported = run.recorder.summary.content.export
    files = list(run.layout.export.glob("*.safetensors"))
    assert exported.bytes == sum(file.stat().st_size for file in files) > 0
    assert (exported.format, exported.dtype, exported.adapter) == ("dense", "float32", True)
    output = capsys.readouterr().out
    assert "export (float32, adapter merged)" in output
    assert "perplexity" not in output  # a column without a value
    assert f"AutoModelForCausalLM.from_pretrained('{run.layout.export}')" in output
    packed = run_task(
        "export", model={"name_or_path": str(trained / "quantized")}, export={"format": "packed"}
    )
    metrics = packed.recorder.summary.content.export
    assert (metrics.format, metrics.adapter) == ("packed", False)
    assert (metrics.max_error, metrics.kl) == (0, None)
    assert f"model.name_or_path={packed.layout.export}" in capsys.readouterr().out


def test_the_table_of_quantize_has_no_empty_columns(run_task, capsys):
    run_task("quantize")
    header = next(line for line in capsys.readouterr().out.splitlines() if "model" in line)
    assert header.split() == ["model", "bits", "per", "weight", "GiB", "seconds"]


@pytest.mark.parametrize(
    ("task", "is_packed", "has_reference"),
    [("finetune", False, True), ("finetune", True, False), ("eval", False, True),
     ("eval", True, False), ("quantize", False, False), ("export", False, False)],
)  # fmt: skip
def test_the_estimate_has_a_reference_only_where_one_is_loaded(task, is_packed, has_reference):
    workload = workload_of(RunConfig(task=task), is_packed=is_packed)
    assert (workload.reference != "off") == has_reference


@pytest.fixture
def packed(run_task) -> Path:
    """Return the packed base of a finished run."""
    return run_task("quantize").layout.quantized


@pytest.fixture
def dense(run_task, packed: Path) -> Path:
    """Return the dense model with the dequantized weights of `packed`."""
    return run_task("export", model={"name_or_path": str(packed)}).layout.export


def stock_adapter(dense: Path, folder: Path, **lora) -> PeftModel:
    """Save an adapter made by PEFT alone, with values as after training, and return its model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    settings = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    adapted = get_peft_model(model, LoraConfig(**settings | lora))
    with torch.no_grad():
        for param in adapted.parameters():
            if param.requires_grad:
                param.add_(0.3 * torch.randn_like(param))
    adapted.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()


TOKENS = torch.arange(20, 44)[None]


@pytest.mark.parametrize(
    ("lora", "adapter"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"kind": "rslora"}),
        ({"rank_pattern": {"0.*q_proj": 3}, "alpha_pattern": {"q_proj": 7}}, {}),
        ({"target_modules": r".*\.(q|up)_proj"}, {"target_modules": ["q_proj", "up_proj"]}),
        ({"layers_to_transform": 0, "target_modules": ["v_proj"]}, {"target_modules": ["v_proj"]}),
    ],
    ids=["lora", "rslora", "patterns", "regex", "layers"],
)
def test_a_stock_adapter_computes_what_peft_computes(
    run_task, start_run, make_config, packed, dense, tmp_path: Path, lora, adapter
):
    right = stock_adapter(dense, tmp_path / "adapter", **lora)(TOKENS).logits
    model = {"name_or_path": str(packed)}
    start = {"target_modules": ["q_proj"], "init_from": str(tmp_path / "adapter")} | adapter
    exported = run_task("export", model=model, adapter=start).layout.export
    merged = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    torch.testing.assert_close(merged(TOKENS).logits, right, rtol=1e-4, atol=1e-5)
    for task in ("eval", "finetune"):
        config = make_config(task, model=model, adapter=start, run={"name": task})
        with start_run(config) as run:
            plan = plan_model(plan_settings(config), run.runtime)
            runnable = wrap_for_execution(load_or_quantize(run, plan), run.runtime.strategy)
            with torch.no_grad():
                logits = runnable.model.eval()(input_ids=TOKENS).logits
        torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["finetune", "eval", "export"])
@pytest.mark.parametrize(
    "lora",
    [
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [5]},
        {"use_dora": True},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_an_adapter_of_another_kind_is_refused_before_anything_is_quantized(
    run_task, tiny_model, tmp_path: Path, task, lora, monkeypatch
):
    stock_adapter(tiny_model, tmp_path / "adapter", **lora)
    monkeypatch.setattr(f"hqqtrain.tasks.{_module_of(task)}.load_or_quantize", None)
    with pytest.raises(UserError, match=rf"adapter\.init_from=.*has {next(iter(lora))}="):
        run_task(task, adapter={"init_from": str(tmp_path / "adapter")})
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("task", ["finetune", "eval", "export"])
def test_an_adapter_of_another_base_or_layer_is_refused_before_anything_is_loaded(
    run_task, trained, tiny_model, tmp_path: Path, task, monkeypatch
):
    other = run_task("quantize", quant={"nbits": 8}).layout.quantized
    monkeypatch.setattr(f"hqqtrain.tasks.{_module_of(task)}.load_or_quantize", None)
    adapter = {"init_from": str(trained / "adapter")}
    with pytest.raises(UserError, match="trained on the base sha256:"):
        run_task(task, model={"name_or_path": str(other)}, adapter=adapter)
    stock_adapter(tiny_model, tmp_path / "adapter")
    adapter, skip = {"init_from": str(tmp_path / "adapter")}, {"skip": ["lm_head", "q_proj"]}
    with pytest.raises(UserError, match=r"adapts .*q_proj, which is not a linear layer of"):
        run_task(task, adapter=adapter, quant=skip)
    stock_adapter(tiny_model, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(UserError, match=r"lm_head.base_layer.weight .*is a weight of the base"):
        run_task(task, adapter=adapter)


def _module_of(task: str) -> str:
    return "finetune" if task == "finetune" else "inference"


def test_what_we_write_loads_with_stock_peft(run_task, packed, dense, tmp_path: Path):
    """Also with ranks and alphas of single layers, which come from the first adapter."""
    patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True}
    targets = ["q_proj", "v_proj"]
    stock_adapter(dense, tmp_path / "adapter", target_modules=targets, **patterns)
    adapter = {"init_from": str(tmp_path / "adapter"), "kind": "rslora", "target_modules": targets}
    model = {"name_or_path": str(packed)}
    trained = run_task("finetune", model=model, adapter=adapter, eval={"source": None}).layout
    merged = run_task("export", model=model, adapter={"init_from": str(trained.adapter)}).layout
    base = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT's own
        theirs = PeftModel.from_pretrained(base, trained.adapter).eval()
    ours = AutoModelForCausalLM.from_pretrained(merged.export, dtype=torch.float32)
    with torch.no_grad():
        right = theirs(TOKENS).logits
        torch.testing.assert_close(ours(TOKENS).logits, right, rtol=1e-4, atol=1e-5)
    assert theirs.peft_config["default"].target_modules == set(targets)
