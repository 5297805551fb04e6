"""transformers loads and saves quantized folders, bit for bit; without hqqtrain it refuses them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hqqtrain
from hqqtrain.common.errors import UserError
from hqqtrain.config.model import ModelConfig
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.models.source import resolve_source
from hqqtrain.nn.hqq_linear import HQQLinear

TOKENS = torch.arange(16).view(2, 8)
CASES = [
    {"nbits": 8, "group_size": None},
    {"nbits": 4, "axis": 0, "group_size": 8},
    {"nbits": 3, "group_size": 8, "meta_dtype": "fp32"},
    {"nbits": 2, "skip": []},
    {"nbits": 1, "overrides": {"*.o_proj": {"nbits": 8}, "*.k_proj": None}},
]


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", CASES, ids=str)
def test_the_same_logits(make_trained, tmp_path: Path, quant: dict, tied: bool, caplog):
    trained = make_trained("qwen2", tied=tied, **quant)
    folder = trained.save(tmp_path / "quantized")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    with trained.model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(trained.model))
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    packed = [module for module in model.modules() if isinstance(module, HQQLinear)]
    assert len(packed) == len(trained.settings.modules)
    assert not any(p.requires_grad for module in packed for p in module.parameters())


def test_a_model_in_bf16_keeps_the_dtypes_of_scale_and_zero(make_trained, tmp_path: Path):
    folder = make_trained(nbits=8, meta_dtype="fp32").save(tmp_path / "quantized")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.compute_dtype, layer.scale.dtype) == (torch.bfloat16, torch.float32)
    assert logits_of(model).dtype == torch.bfloat16


def test_save_pretrained_writes_what_we_and_transformers_load(make_trained, tmp_path: Path):
    trained = make_trained(nbits=3)
    model = AutoModelForCausalLM.from_pretrained(trained.save(tmp_path / "quantized"))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(model))
    assert read_quantized_settings(tmp_path / "again") == trained.settings
    assert resolve_source(ModelConfig(name_or_path=str(tmp_path / "again"))).kind == "quantized"
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("quantized", "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_dequantizes_to_a_dense_model(make_trained, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(make_trained().save(tmp_path / "quantized"))
    before = logits_of(model)
    dense = model.dequantize()
    assert not any(isinstance(module, HQQLinear) for module in dense.modules())
    torch.testing.assert_close(logits_of(dense), before)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_generate(make_trained, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(
        make_trained().save(tmp_path / "quantized"), device_map="cpu"
    )
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape[1] <= 11


def test_tensor_parallel_parts_are_refused(make_trained, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(make_trained().save(tmp_path / "quantized"))
    model._tp_size = 2
    with pytest.raises(UserError, match=r"tp_plan: .* use device_map"):
        model.hf_quantizer.postprocess_model(model)


def test_another_layout_version_is_refused(make_trained, tmp_path: Path):
    folder = make_trained().save(tmp_path / "quantized")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"layout_version": 1', '"layout_version": 9')
    )
    with pytest.raises(UserError, match="layout_version=9"):
        AutoModelForCausalLM.from_pretrained(folder)


def run_program(*lines: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)


def test_without_hqqtrain_folder_and_adapter_are_refused(make_trained, tmp_path: Path):
    trained = make_trained()
    folder = trained.save(tmp_path / "quantized")
    adapter = trained.save_adapter(tmp_path / "adapter", str(folder))
    done = run_program(
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoModelForCausalLM",
        f"for auto, path in ((AutoModelForCausalLM, {str(folder)!r}), "
        f"(AutoModelForCausalLM, {str(adapter)!r}), (AutoPeftModelForCausalLM, {str(adapter)!r})):",
        "    try: auto.from_pretrained(path)",
        "    except RuntimeError as error: print('mismatch' in str(error))",
        "    else: print('loaded')",
    )
    assert done.stdout == "True\n" * 3, done.stderr


def test_hqqtrain_may_be_imported_last(make_trained, tmp_path: Path):
    """In this process it is imported first."""
    folder = make_trained().save(tmp_path / "quantized")
    done = run_program(
        "import transformers.quantizers.auto, hqqtrain",
        "from transformers import AutoModelForCausalLM",
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r})",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", CASES, ids=str)
def test_a_dense_model_is_quantized_while_it_loads(
    make_trained, tmp_path: Path, quant: dict, tied: bool
):
    settings = {"solver": "rtn", "nbits": 2, "group_size": 16} | quant
    trained = make_trained("qwen2", tied=tied, calibration=None, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        trained.source, quantization_config=hqqtrain.HqqTrainConfig(**settings)
    )
    with trained.model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(trained.model))
    model.save_pretrained(tmp_path / "saved")
    assert read_quantized_settings(tmp_path / "saved") == trained.settings
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4}, "bits is no setting; allowed are nbits, group_size"),
        ({"nbits": 5}, r"HqqTrainConfig.nbits=5: allowed are 8, 4, 3, 2, 1"),
        ({"solver": "gptq"}, r"^HqqTrainConfig.solver=gptq: needs text .* use task=quantize"),
        ({"overrides": {"x": {"nbits": 7}}}, r"^HqqTrainConfig.overrides\[x\].*nbits=7"),
        ({"nbits": None}, "nothing would be quantized"),
        ({"nbits": True}, "^HqqTrainConfig.nbits=True: must be an integer"),
        ({"nbits": 4.0}, "^HqqTrainConfig.nbits=4.0: must be an integer"),
        ({"skip": "q_proj"}, "^HqqTrainConfig.skip=q_proj: must be a list"),
        ({"overrides": None}, "^HqqTrainConfig.overrides=null: must be a mapping"),
        ({"meta_dtype": torch.bfloat16}, "torch.bfloat16: allowed are auto, fp32"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        hqqtrain.HqqTrainConfig(**settings)


def test_settings_that_do_not_fit_the_model_are_refused(make_trained):
    config = hqqtrain.HqqTrainConfig(skip=["no_such_layer"], group_size=24)
    with pytest.raises(UserError, match=r"HqqTrainConfig\.skip.*no_such_layer") as caught:
        AutoModelForCausalLM.from_pretrained(make_trained().source, quantization_config=config)
    assert "quant." not in str(caught.value)


def test_settings_become_json_values_of_the_right_type():
    config = hqqtrain.HqqTrainConfig(nbits=2, group_size="32", skip=("q_proj",))
    assert config.to_dict()["skip"] == ["q_proj"]
    assert config.quant_config().group_size == 32
    with pytest.raises(TypeError, match="positional"):
        hqqtrain.HqqTrainConfig(2)  # not silently 4 bits


def test_a_folder_without_a_packed_tensor_is_refused(make_trained, tmp_path: Path):
    folder = make_trained().save(tmp_path / "quantized")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".W_q"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"quantized: has no {name}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_layers_on_disk_are_not_quantized(make_trained, tmp_path: Path):
    dense = make_trained().source
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    with pytest.raises(UserError, match="layers on disk cannot be quantized"):
        AutoModelForCausalLM.from_pretrained(
            dense,
            device_map=dict.fromkeys(names, "cpu") | {"model.layers": "disk"},
            offload_folder=tmp_path / "offload",
            quantization_config=hqqtrain.HqqTrainConfig(group_size=8),
        )


def test_a_name_that_does_not_exist():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hqqtrain.no_such_name
