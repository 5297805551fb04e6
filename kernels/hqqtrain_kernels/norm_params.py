"""The parameters of an RMSNorm, for its plain code and its kernels."""

from typing import Literal, NamedTuple


class NormParams(NamedTuple):
    """How an RMSNorm computes weight * x / sqrt(mean(x^2) + eps).

    Attributes:
        eps: Is added to the mean square.
        offset: Is added to the weight: 1 for Gemma, otherwise 0.
        casting: `llama` rounds to the dtype of x before it multiplies by the weight, and `gemma`
            after it.
    """

    eps: float
    offset: float = 0.0
    casting: Literal["llama", "gemma"] = "llama"
