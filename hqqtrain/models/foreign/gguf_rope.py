"""The scaling of positions in a GGUF file, which transformers does not read.

Llama 3.1 and later divide the frequencies of rotary embeddings by a factor of their own each. GGUF
has these factors, `rope_freqs.weight`; config.json has the numbers that they are computed from.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LOW_FREQUENCY, HIGH_FREQUENCY, ORIGINAL_POSITIONS = 1.0, 4.0, 8192
"""The numbers of all released Llama 3 models; only the factor differs."""


def llama3_parameters(
    factors: Sequence[float] | np.ndarray, rope: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return `rope_parameters` with the scaling of Llama 3 that gives these factors.

    Args:
        factors: What each frequency is divided by, fp32 [head_dim / 2].
        rope: `rope_parameters` without scaling.

    Returns:
        The parameters; None if the factors are not those of Llama 3.
    """
    found = np.asarray(factors, dtype=np.float64)
    if not found.size or not np.isfinite(found).all() or "rope_theta" not in rope:
        return None
    factor, theta = round(float(found.max()), 4), float(rope["rope_theta"])
    expected = [_factor(theta ** (i / len(found)), factor) for i in range(len(found))]
    if factor <= 0 or not np.allclose(found, expected, rtol=1e-3):
        return None
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LOW_FREQUENCY,
        "high_freq_factor": HIGH_FREQUENCY,
        "original_max_position_embeddings": ORIGINAL_POSITIONS,
    }


def _factor(radians: float, factor: float) -> float:
    """Return what a frequency of one radian in `radians` positions is divided by.

    Long waves are slowed down by `factor`, short ones stay, and those between are interpolated.
    """
    turns = ORIGINAL_POSITIONS / (2 * math.pi * radians)
    share = (turns - LOW_FREQUENCY) / (HIGH_FREQUENCY - LOW_FREQUENCY)
    share = min(max(share, 0.0), 1.0)
    return 1 / ((1 - share) / factor + share) if factor else 0.0
