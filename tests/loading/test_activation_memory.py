"""Activations are counted tensor by tensor; fewer recomputed layers keep more of them."""

import torch
from memory_estimates import meta_model, two_bit_config

from hqqtrain.loading.activation_memory import LayerWidths, TrainingPeak, activation_bytes
from hqqtrain.tasks.resources import workload_of


def test_widths_of_llama_3_8b():
    widths = LayerWidths.of(meta_model("Meta-Llama-3-8B", two_bit_config()))
    assert widths.is_known
    assert (widths.qkv, widths.rotated, widths.attention) == (6144, 5120, 4096)
    assert (widths.inner, widths.gate_up) == (14336, 28672)
    assert widths.largest_block == 28672 * 4096
    assert widths.saved(2, fused=True) == 2 * (4 * 4096 + 6144 + 4096 + 28672)


def test_more_recomputed_layers_and_fewer_tokens_keep_less():
    config = two_bit_config()
    model = meta_model("tiny", config)

    def kept() -> int:
        return activation_bytes(workload_of(config), model, torch.bfloat16)

    sizes = []
    for config.train.activation_checkpointing in ("none", 1, 3, "full"):
        sizes.append(kept())
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    config.train.max_seq_len //= 2
    assert kept() == sizes[-1] // 2


def test_fused_blocks_keep_less_than_pefts_path():
    config = two_bit_config()
    model = meta_model("tiny", config)
    config.train.activation_checkpointing = "none"
    fused = TrainingPeak.of(workload_of(config), model, torch.bfloat16)
    config.train.fused = "false"
    assert TrainingPeak.of(workload_of(config), model, torch.bfloat16).kept > fused.kept
    config.task = "quantize"
    assert TrainingPeak.of(workload_of(config), model, torch.bfloat16).kept == 0
