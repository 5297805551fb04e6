"""The estimate is exact for weights, and its messages name the keys that help."""

import pytest
import torch
from memory_estimates import GIB, estimate, meta_model, two_bit_config
from peft import get_peft_model

from hqqtrain.config.export import ExportConfig
from hqqtrain.config.groups import EvalConfig
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.source import shipped_folder
from hqqtrain.nn.lora import lora_config
from hqqtrain.nn.replace import quantize_model
from hqqtrain.training.fused_lora import fuse_lora


def test_weights_are_counted_to_the_byte():
    config = two_bit_config()
    model = meta_model("tiny", config)
    parts = estimate(config, model, dtype=torch.bfloat16).device
    packed, dense, lora = 0, 0, 0
    for name, param in model.named_parameters():
        if "lora_" in name:
            lora += param.numel()
        elif name.endswith(("W_q", "scale", "zero")):
            packed += param.numel() * param.element_size()
        else:
            dense += param.numel() * 2
    assert parts["packed weights"] == packed
    assert parts["dense weights"] == dense
    assert parts["adapter and optimizer"] == lora * 16
    assert parts["reference model"] == 5770496 * 2


def test_memory_of_an_8b_model_at_two_bits():
    config = two_bit_config(eval=EvalConfig(reference="off"))
    needs = estimate(config, meta_model("meta-llama/Meta-Llama-3-8B", config), dtype=torch.bfloat16)
    # 6.98e9 weights of linears at 2.5 bits; embedding and head of 128256 x 4096 in bf16.
    assert needs.device["packed weights"] == pytest.approx(6.98e9 * 2.5 / 8, rel=0.01)
    assert needs.device["dense weights"] == pytest.approx(2 * 128256 * 4096 * 2, rel=0.01)
    assert needs.device["reference model"] == 0
    assert 4 * GIB < sum(needs.device.values()) < 16 * GIB
    assert needs.disk["quantized/"] == pytest.approx(4.28e9, rel=0.01)


def test_sharding_divides_parameters_only():
    config = two_bit_config()
    model = meta_model("tiny", config)
    one = estimate(config, model, dtype=torch.float32).device
    four = estimate(config, model, dtype=torch.float32, world_size=4, strategy="fsdp2").device
    ddp = estimate(config, model, dtype=torch.float32, world_size=4, strategy="ddp").device
    kept = "outputs of the reference model"  # each rank keeps those of its texts
    assert ddp == one | {kept: one[kept] // 4}
    assert one[kept] == config.eval.tokens * 256 * 4
    for part in ("packed weights", "dense weights", "adapter and optimizer", "reference model"):
        assert four[part] == one[part] // 4
    assert four["activations"] == one["activations"]


def test_a_vision_tower_is_outside_of_the_decoder_layers():
    """FSDP2 gathers all parameters outside of decoder layers, also those of numbered modules."""
    config = two_bit_config()
    model = meta_model("tiny", config)
    before = estimate(config, model, dtype=torch.float32, world_size=4, strategy="fsdp2")
    tower = torch.nn.ModuleList([torch.nn.Conv1d(4, 4, 1, bias=False, device="meta")])
    model.get_base_model().vision_tower = tower
    after = estimate(config, model, dtype=torch.float32, world_size=4, strategy="fsdp2")
    gathered = after.device["working memory"] - before.device["working memory"]
    assert gathered == 16 * 4 * 3 // 4 + 16 * 4  # the other ranks' shards, and the all-gather


def test_settings_that_save_memory_lower_the_estimate():
    config = two_bit_config()
    model = meta_model("tiny", config)

    def parts():
        return estimate(config, model, dtype=torch.bfloat16).device

    before = parts()
    by_mode = []
    for mode in ("full", 6, 5, 1, "none"):  # the last layer need not recompute
        config.train.activation_checkpointing = mode
        by_mode.append(parts()["activations"])
    assert by_mode[0] == by_mode[1] == before["activations"] >= by_mode[2]
    assert by_mode[2] < by_mode[3] < by_mode[4]
    config.train.activation_checkpointing = "full"
    config.train.max_seq_len //= 2
    assert parts()["activations"] == before["activations"] // 2
    assert parts()["logits"] < before["logits"]
    config.optim.name = "paged_adamw_8bit"
    assert parts()["adapter and optimizer"] < before["adapter and optimizer"]
    eight = parts()["adapter and optimizer"]
    config.adapter.dtype = "bf16"
    assert (
        parts()["adapter and optimizer"] == eight * 6 // 10
    )  # 2 + 2 + 2 bytes instead of 4 + 4 + 2
    whole = parts()["activations"]
    config.train.activation_checkpointing = "offload"
    offloaded = estimate(config, model, dtype=torch.bfloat16, offloads_activations=True).device[
        "activations"
    ]
    assert whole - offloaded == 4 * config.train.max_seq_len * 256 * 2
    config.task, config.eval.source = "quantize", None
    unused = ("adapter and optimizer", "reference model", "activations", "logits")
    assert [parts()[part] for part in unused] == [0, 0, 0, 0]


def test_a_batch_of_the_evaluation_has_at_least_one_window():
    config = two_bit_config(task="eval")
    model = meta_model("tiny", config)

    def logits(**evaluation) -> int:
        config.eval = EvalConfig(**evaluation)
        parts = estimate(config, model, dtype=torch.bfloat16).device
        return parts["logits"] + parts["working memory"]

    config.train.max_seq_len, config.train.micro_batch_size = 512, 2
    whole = logits()
    assert logits(protocol="hqq") == whole  # a window of 1024 tokens
    assert logits(protocol="wikitext2_2048") == 2 * whole


@pytest.mark.parametrize("fused", ["auto", "false"])
def test_activations_match_what_autograd_saves(fused: str):
    """The formula is near the size of all tensors saved for backward, without checkpointing."""
    config = two_bit_config()
    config.train.fused = fused
    config.train.activation_checkpointing, config.train.max_seq_len = "none", 128
    model = build_meta(load_hf_config(shipped_folder("tiny"))).to_empty(device="cpu").float()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.02)
    quantize_model(model, config.quant)
    model = get_peft_model(model, lora_config(config.adapter, model))
    if fused == "auto":
        fuse_lora(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        logits = model(torch.arange(128)[None], use_cache=False).logits
    assert logits.requires_grad
    parts = estimate(config, model, dtype=torch.float32).device
    # On PEFT's path the formula counts the casts of autocast, which fp32 does without.
    assert 0.85 < parts["activations"] / sum(saved.values()) < 1.35


GIB_8B = {
    (4, "full"): 9.71, (2, "full"): 8.06, (4, "none"): 33.73, (2, "none"): 32.07,
}  # fmt: skip
"""(quant.nbits, train.activation_checkpointing) -> peak GiB, measured on one H200 on 2026-12-01:
Llama 3 8B, g64, r=16, 4 x 2048 tokens, torch 2.11, liger-kernel installed."""

PLAIN_GIB_8B = {(4, "full"): 10.9, (4, "none"): 64.3}
"""The same without fused blocks, of commit 9747aad on 2026-11-29."""


EVALUATED_GIB = {
    ("Meta-Llama-3-8B", 4): {2048: 8.70, 4096: 10.16, 8192: 11.24},
    ("Meta-Llama-3-8B", 2): {2048: 7.05, 4096: 8.51, 8192: 9.59},
}
"""(model, bits) -> tokens -> peak GiB of an H200 that evaluates a text and trains on it without
fused blocks, of kernels/bench/results/memory.csv. The evaluation has the peak."""


def test_the_peak_of_an_evaluation_is_the_measured_one():
    config = two_bit_config(eval=EvalConfig(reference="off"))
    config.model.source, config.train.fused = "synthetic", "false"
    for (name, nbits), lengths in EVALUATED_GIB.items():
        config.quant.nbits = nbits
        model = meta_model(name, config)
        for config.train.max_seq_len, gib in lengths.items():
            peak = estimate(config, model, dtype=torch.bfloat16).peak
            assert peak / GIB == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize(("fused", "measured"), [("auto", GIB_8B), ("false", PLAIN_GIB_8B)])
def test_the_peak_of_an_8b_model_is_the_measured_one(
    fused: str, measured: dict[tuple[int, str], float]
):
    config = two_bit_config(eval=EvalConfig(source=None))
    config.model.source, config.train.micro_batch_size = "synthetic", 4
    config.train.fused = fused
    for (nbits, mode), gib in measured.items():
        config.quant.nbits, config.train.activation_checkpointing = nbits, mode
        model = meta_model("Meta-Llama-3-8B", config)
        peak = estimate(config, model, dtype=torch.bfloat16).peak
        assert peak / GIB == pytest.approx(gib, rel=0.05)


def test_what_each_strategy_shards():
    config = two_bit_config()
    model = meta_model("tiny", config)

    def device_bytes(strategy: str) -> dict[str, int]:
        found = estimate(config, model, dtype=torch.float32, world_size=4, strategy=strategy)
        return found.device

    whole = device_bytes("ddp")
    for strategy in ("fsdp2", "fsdp1", "zero3"):
        assert device_bytes(strategy)["packed weights"] == whole["packed weights"] // 4
    trained = {s: device_bytes(s)["adapter and optimizer"] for s in ("fsdp1", "zero3")}
    assert trained["fsdp1"] == whole["adapter and optimizer"] == trained["zero3"] * 4


def test_existing_results_need_no_disk():
    config = two_bit_config()
    model = meta_model("tiny", config)
    parts = estimate(config, model, dtype=torch.bfloat16).disk
    adapter = parts["adapter/"]
    assert parts["quantized/"] > 0
    assert parts["checkpoints/"] == 3 * 3 * adapter  # two kept checkpoints and the next one
    resumed = estimate(
        config, model, dtype=torch.bfloat16, has_quantized=True, has_checkpoints=True
    ).disk
    assert resumed == {
        "quantized/": 0,
        "adapter/": adapter,
        "checkpoints/": 3 * adapter,
        "export": 0,
    }


def test_an_export_needs_the_disk_of_its_format():
    """The dense model has all weights in the run's dtype; the packed one is like quantized/."""
    model = meta_model("tiny", two_bit_config())

    def export_bytes(format: str) -> int:
        config = two_bit_config(task="export", export=ExportConfig(format=format))
        return estimate(config, model, dtype=torch.bfloat16).disk["export"]

    quantized = estimate(two_bit_config(), model, dtype=torch.bfloat16).disk["quantized/"]
    assert export_bytes("packed") == export_bytes("mlx") == quantized
    assert export_bytes("gguf") == 5770496 * 17 // 16
    assert export_bytes("dense") == 5770496 * 2 > quantized


def _kept(model: torch.nn.Module, strategy: str = "single", **settings) -> int:
    config = two_bit_config(eval=EvalConfig(**settings))
    parts = estimate(config, model, dtype=torch.bfloat16, strategy=strategy).device
    return parts["outputs of the reference model"]


def test_the_kept_outputs_of_the_reference_are_counted_where_there_are_any():
    model = meta_model("tiny", two_bit_config())
    assert _kept(model, tokens=1000) == 1000 * 256 * 2
    assert _kept(model, tokens=1000, reference="off") == 0
    assert _kept(model, tokens=1000, source=None) == 0
    assert _kept(model, tokens=1000, strategy="fsdp2") == 0
    assert _kept(model, tokens=1 << 20) == 1 << 29
    assert _kept(model, tokens=(1 << 20) + 1) == 0
    quantized_head = two_bit_config()
    quantized_head.quant.skip = []
    assert _kept(meta_model("tiny", quantized_head), tokens=1000) == 0


def test_what_is_trained_of_the_base_is_counted():
    def parts(**adapter: object) -> dict[str, int]:
        config = two_bit_config()
        for key, value in adapter.items():
            setattr(config.adapter, key, value)
        model = build_meta(load_hf_config(shipped_folder("tiny")))
        quantize_model(model, config.quant)
        lora = lora_config(config.adapter, model, ids)
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        return estimate(config, model, dtype=torch.bfloat16).device

    ids: list[int] = []
    plain, with_norm = parts(), parts(modules_to_save=["norm"])
    assert with_norm["adapter and optimizer"] - plain["adapter and optimizer"] == 256 * 16
    ids = [1, 2, 3]
    with_tokens = parts()
    assert with_tokens["adapter and optimizer"] - plain["adapter and optimizer"] == 3 * 256 * 16
    assert with_tokens["working memory"] - plain["working memory"] == 2 * 4096 * 256 * 2
