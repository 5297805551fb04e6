"""Small models of architectures that differ in how, and whether, they keep packed texts apart."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "head_dim": 16}  # fmt: skip
_ENCODER = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 130}  # fmt: skip

PACKED: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 8},
    "gemma3_text": SMALL | {"head_dim": 16, "sliding_window": 8,
                            "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": SMALL,
    "deepseek_v3": SMALL | {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                            "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8,
                            "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
                            "num_key_value_heads": 4,
                            "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "falcon": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2,
               "num_attention_heads": 4},
    "falcon_alibi": {"model_type": "falcon", "alibi": True, "vocab_size": 512, "hidden_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip
"""Settings of models that keep packed texts apart by `position_ids`."""

IN_ROWS: dict[str, dict[str, Any]] = {
    "opt": {"vocab_size": 512, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 256},
    "bloom": {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4},
    "roberta": _ENCODER | {"is_decoder": True, "pad_token_id": 1},
    "mamba": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2},
    "mamba2": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8,
               "head_dim": 16, "n_groups": 2, "state_size": 16, "chunk_size": 8},
    "rwkv": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2},
    "bamba": SMALL | _MAMBA | {"attn_layer_indices": [1]},
    "lfm2": SMALL | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": SMALL | _DELTA | {"layer_types": ["linear_attention", "full_attention"],
                                    "num_experts": 4, "num_experts_per_tok": 2,
                                    "moe_intermediate_size": 32,
                                    "shared_expert_intermediate_size": 32},
    "recurrent_gemma": SMALL | {"block_types": ["recurrent", "attention"], "lru_width": 64,
                                "attention_window_size": 8},
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
                        "sliding_window": 8},
}  # fmt: skip
"""Settings of models that let a text see the texts before it in its row."""

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "electra": _ENCODER | {"embedding_size": 64},
}
"""Settings of models whose tokens see later ones."""


def small_config(name: str, settings: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration of a small model of the architecture `name`."""
    options = dict(settings)
    return CONFIG_MAPPING[options.pop("model_type", name)](**options)


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of `config` with random weights, with which each layer changes the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, 0, 1.5 / parameter.shape[-1] ** 0.5)
    return model
