"""Weights shared by the tests of quantization."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import hqqtrain

TINY = Path(hqqtrain.__file__).parent / "models" / "tiny" / "model.safetensors"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    """Four weights [256, 256]: Gaussian, heavy-tailed, and two of the bundled model (bf16)."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4, 256, 256, generator=generator)
    student = normal[0] / normal[1:].square().mean(0).sqrt()  # 3 degrees of freedom
    with safe_open(TINY, "pt") as file:
        q_proj = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
        down_proj = file.get_tensor("model.layers.5.mlp.down_proj.weight")[:, :256]
    return {
        "gaussian": normal[0] * 0.02,
        "student": student * 0.02,
        "q_proj": q_proj,
        "down_proj": down_proj.contiguous(),
    }
