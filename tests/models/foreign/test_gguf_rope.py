"""The scaling of Llama 3, recognized by its factors, which transformers computes here."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hqqtrain.models.foreign.gguf_rope import llama3_parameters

PLAIN = {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_the_parameters_give_the_factors_of_transformers(factor, head_dim):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    assert llama3_parameters((plain / scaled).numpy(), PLAIN) == rope


@pytest.mark.parametrize("factors", [[], [1.0, 2.0, 3.0], [float("nan")] * 4, [0.0] * 4, [-1.0]])
def test_other_factors(factors):
    assert llama3_parameters(factors, PLAIN) is None
