"""The group `quant`: how the weights of linear layers are quantized."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqqtrain.config.field import DTYPES, key
from hqqtrain.config.overrides import override_errors

NBITS = (8, 4, 3, 2, 1)

# The registry of solvers imports torch, so its names are repeated here. A test fails if the two
# lists differ.
SOLVERS = ("least_squares", "gptq", "hqq", "rtn")

CALIBRATED_SOLVERS = ("least_squares", "gptq")
"""The solvers that use `quant.calibration`; a test compares them with the registry, too."""

AUTO_DATA_FREE = {8: "hqq", 4: "hqq"}
"""The solver of `quant.solver=auto` without calibration, by nbits; least_squares at all others.

On SmolLM2-135M at 4 bits hqq has a perplexity of 1.198 times full precision, and least_squares of
1.211; at 3 bits they have 7.8 and 5.4 (Python code, groups of 64 on axis 1).
"""

ZEROS = ("float", "integer")

INFERENCE_BACKENDS = ("gemlite", "humming", "torchao")
"""The backends that only compute forward; a test compares them with the registry."""


@dataclass(kw_only=True, slots=True)
class QuantConfig:
    """How the weights of linear layers are quantized."""

    nbits: int | None = key(
        4,
        "bits per quantized weight; null: nothing is quantized, so that the adapters are plain "
        "16-bit LoRA",
        choices=(*NBITS, None),
    )
    group_size: int | None = key(
        64, "weights that share a scale and a zero; null: a whole row or column", low=2
    )
    axis: int = key(1, "1: groups run along a row; 0: down a column", choices=(0, 1))
    solver: str = key(
        "auto",
        "algorithm that fits scale and zero; auto: gptq with quant.calibration below 8 bits, else "
        "the best without text; gptq: with error feedback; rtn: round to nearest",
        choices=("auto", *SOLVERS),
    )
    zero: str = key(
        "float",
        "zero points; integer: codes, as engines for GPTQ and AWQ checkpoints need them, at a "
        "higher error",
        choices=ZEROS,
    )
    calibration: str | None = key(
        "auto",
        "text whose activations weigh the errors (gptq, least_squares): a value of data.source; "
        "auto: data.source itself; null: none, which takes seconds instead of minutes",
    )
    calibration_tokens: int = key(
        65536, "tokens of quant.calibration that are used, in sequences of 512", low=512
    )
    storage_dtype: str = key(
        "auto",
        "dtype as which the packed W_q is stored in memory; the bits are the same",
        choices=("auto", "uint8", "bf16", "fp16", "fp32"),
    )
    compute_dtype: str = key("auto", "dtype of dequantized weights", choices=DTYPES)
    meta_dtype: str = key(
        "auto", "dtype of scale and zero; auto: fp32 at 8 bits, otherwise bf16", choices=DTYPES
    )
    skip: list[str] = key(
        help="linear layers to leave in full precision: names (q_proj), globs or hqq tags",
        factory=lambda: ["lm_head"],
    )
    overrides: dict[str, Any] = key(
        help="settings of single layers: name (q_proj), glob or hqq tag -> {nbits: 4, ...}; null "
        "instead of settings: full precision",
        factory=dict,
    )
    offload_meta: bool = key(
        False,
        "keep scale and zero in host memory and copy them to the GPU layer by layer, ahead of use; "
        "with strategy single or ddp",
    )
    backend: str = key(
        "auto",
        "implementation of quantization and of products with packed weights; auto: Triton kernels "
        "where they run, otherwise PyTorch; gemlite, humming, torchao: the kernels of these, for "
        "products in task=generate and task=eval",
        choices=("auto", "triton", "torch", *INFERENCE_BACKENDS),
    )
    save: bool = key(True, "save the quantized model in quantized/")
    cache_dir: str | None = key(
        None,
        "folder of quantized weights that runs share; null: no sharing, but a sweep uses "
        "<run.root>/quantized",
    )

    @property
    def quantizes(self) -> bool:
        """Whether any layer is quantized; without, the adapters are trained on the dense model."""
        return self.nbits is not None

    def solver_for(self, nbits: int) -> str:
        """Return the solver of layers with `nbits` bits that no override gives another one."""
        if self.solver != "auto":
            return self.solver
        if self.calibration is not None and nbits < 8:
            return "gptq"
        return AUTO_DATA_FREE.get(nbits, "least_squares")

    @property
    def inference_backend(self) -> str | None:
        """The backend of another package that multiplies with the packed weights, if any."""
        return self.backend if self.backend in INFERENCE_BACKENDS else None

    @property
    def calibrates(self) -> bool:
        """Whether the solver of any layer uses `calibration`."""
        if self.nbits is None or self.calibration is None:
            return False
        overrides = [settings for settings in self.overrides.values() if isinstance(settings, dict)]
        solvers = {
            settings.get("solver") or self.solver_for(settings.get("nbits", self.nbits))
            for settings in ({}, *overrides)
        }
        return not solvers.isdisjoint(CALIBRATED_SOLVERS)

    @property
    def calibration_source(self) -> str | None:
        """The source that `calibration` names, unless it is that of the training data or unused."""
        return self.calibration if self.calibrates and self.calibration != "auto" else None

    def errors(
        self, text_advice: str = "set quant.calibration=auto for that of data.source"
    ) -> Iterator[str]:
        """Yield one message for every setting of `overrides` that is not allowed, and others.

        Args:
            text_advice: How to get text for a solver that needs it.
        """
        choices = {"nbits": NBITS, "axis": (0, 1), "solver": SOLVERS, "zero": ZEROS}
        for pattern, settings in self.overrides.items():
            yield from override_errors(f"quant.overrides[{pattern}]", settings, choices)
        solvers = {"quant.solver": self.solver} | {
            f"quant.overrides[{pattern}].solver": settings.get("solver")
            for pattern, settings in self.overrides.items()
            if isinstance(settings, dict)
        }
        for where, solver in solvers.items():
            if solver == "gptq" and self.calibration is None:
                yield (
                    f"{where}=gptq: needs text to calibrate with; {text_advice}, or choose "
                    "least_squares."
                )
