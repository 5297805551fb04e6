"""The config groups, one dataclass each: every key a user can set, with its help line.

Values that a later release will allow are simply not among the `choices` yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqqtrain.config.field import key

NBITS = (8, 4, 3, 2, 1)

SOLVERS = ("least_squares", "hqq", "rtn")

DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model, and where its weights come from."""

    name_or_path: str = key("tiny", "hub name, local folder, a run's quantized/, or 'tiny'")
    revision: str | None = key(None, "branch, tag or commit on the hub")
    source: str = key(
        "pretrained", "the weights; synthetic: random ones, made up on the way, of any size",
        choices=("pretrained", "synthetic"),
    )  # fmt: skip


@dataclass(kw_only=True, slots=True)
class QuantConfig:
    """How the weights of linear layers become codes."""

    nbits: int = key(4, "bits of a code", choices=NBITS)
    group_size: int | None = key(64, "weights that share a scale; null: row or column", low=2)
    axis: int = key(1, "1: groups run along a row, 0: down a column", choices=(0, 1))
    solver: str = key("least_squares", "how scale and zero are found", choices=SOLVERS)
    storage_dtype: str = key(
        "auto", "dtype that W_q is held in; the bits are the same",
        choices=("auto", "uint8", "bf16", "fp16", "fp32"),
    )  # fmt: skip
    compute_dtype: str = key("auto", "dtype of dequantized weights", choices=DTYPES)
    meta_dtype: str = key(
        "auto", "dtype of scale and zero; auto: bf16, fp32 at 8 bits", choices=DTYPES
    )
    skip: list[str] = key(
        help="globs or hqq tags of linears left in full precision", factory=lambda: ["lm_head"]
    )
    overrides: dict[str, Any] = key(
        help="glob or hqq tag -> other settings, or null: full precision", factory=dict
    )
    backend: str = key(
        "auto",
        "what quantizes and computes with packed weights; auto: Triton kernels where they run",
        choices=("auto", "triton", "torch"),
    )
    save: bool = key(True, "write quantized/")
    cache_dir: str | None = key(
        None,
        "folder in which runs share quantized weights; null: none, in a sweep <run.root>/quantized",
    )

    def faults(self) -> Iterator[str]:
        for pattern, settings in self.overrides.items():
            yield from _override_faults(f"quant.overrides[{pattern}]", settings)


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """What is trained on top of the frozen, quantized weights."""

    kind: str = key("lora", "adapter trained on the base", choices=("lora", "rslora", "none"))
    r: int = key(16, "rank", low=1)
    alpha: float = key(32.0, "scaling: alpha / r, with rslora alpha / sqrt(r)", low=0)
    dropout: float = key(0.0, "dropout of the adapter's input", low=0)
    dtype: str = key(
        "fp32", "of adapters, their gradients and optimizer state; bf16 loses small updates",
        choices=("fp32", "bf16"),
    )  # fmt: skip
    init: str = key("default", "PEFT's init_lora_weights", choices=("default", "gaussian"))
    init_from: str | None = key(None, "folder of a PEFT adapter to start from or to measure")
    target_modules: list[str] = key(
        help="globs of quantized linears that get an adapter", factory=lambda: ["*"]
    )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop; a setting means the same at any number of processes."""

    objective: str = key(
        "next_token",
        "the loss; next_token: cross-entropy of the next token",
        choices=("next_token",),
    )
    max_steps: int | None = key(None, "optimizer steps; beats epochs", low=0)
    epochs: float = key(1.0, "passes over the data", low=0)
    global_batch_size: int = key(16, "sequences an optimizer step, over all ranks", low=1)
    micro_batch_size: int = key(1, "sequences of one forward pass on one rank, at most", low=1)
    max_seq_len: int = key(2048, "tokens of a sequence", low=2)
    packing: bool = key(True, "fill sequences with several texts")
    activation_checkpointing: bool = key(True, "recompute activations in the backward pass")
    precision: str = key("auto", "auto: bf16 on a GPU, fp32 on a CPU", choices=DTYPES)
    max_grad_norm: float | None = key(1.0, "clip the gradient to this norm; null: never", low=0)
    on_nonfinite: str = key(
        "stop",
        "a loss or gradient that is not finite; skip: leave the batch out, rollback: also go back "
        "to the last checkpoint",
        choices=("stop", "skip", "rollback"),
    )  # fmt: skip
    seed: int = key(0, "of adapters and the order of samples", low=0)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its learning rate over time."""

    name: str = key(
        "adamw", "8-bit and paged ones are bitsandbytes'",
        choices=("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
    )  # fmt: skip
    lr: float = key(1e-4, "peak learning rate", low=0)
    weight_decay: float = key(0.0, "decoupled weight decay", low=0)
    schedule: str = key("cosine", "after the warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int = key(0, "steps of linear warm-up", low=0)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The text that is trained on."""

    source: str = key("python_stdlib", "python_stdlib, a file or folder, or a hub name")
    format: str = key(
        "auto", "of files; auto: by ending", choices=("auto", "text", "jsonl", "parquet")
    )
    text_field: str = key("text", "the column that holds the text")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """The held-out text, and what is measured on it."""

    source: str | None = key("python_stdlib", "held-out text, as data.source; null: never")
    every: int | None = key(None, "steps between evaluations; null: before and after", low=1)
    tokens: int = key(65536, "at most so many tokens are measured", low=2)
    reference: str = key(
        "resident", "how the full-precision model is measured", choices=("off", "resident")
    )


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the work is spread over processes, and between a GPU and its host."""

    strategy: str = key(
        "auto", "auto: single for one process, else fsdp2",
        choices=("auto", "single", "ddp", "fsdp2", "fsdp1", "zero3"),
    )  # fmt: skip
    hsdp: bool = key(False, "fsdp2: shard within a node, replicate between nodes")
    offload: str = key(
        "none",
        "to the host's memory: activations that checkpointing keeps, fsdp2's parameters, or all",
        choices=("none", "activations", "parameters", "all"),
    )
    consistency_check_every: int | None = key(
        100, "steps between checks that ranks agree and frozen bits are as they were; null: never",
        low=1,
    )  # fmt: skip

    @property
    def offloads_activations(self) -> bool:
        return self.offload in ("activations", "all")

    @property
    def offloads_parameters(self) -> bool:
        return self.offload in ("parameters", "all")


_OVERRIDES = {"nbits": NBITS, "axis": (0, 1), "solver": SOLVERS}


def _override_faults(where: str, settings: Any) -> Iterator[str]:
    if settings is None:
        return
    if not isinstance(settings, dict):
        yield f"{where}={settings}: must be null or settings such as {{nbits: 4}}."
        return
    for name, value in settings.items():
        if name == "group_size":
            if value is not None and (type(value) is not int or value < 2):
                yield f"{where}.{name}={value}: must be null or an integer of at least 2."
        elif name not in _OVERRIDES:
            known = ", ".join([*_OVERRIDES, "group_size"])
            yield f"{where}.{name}: unknown; allowed are {known}."
        elif value not in _OVERRIDES[name] or isinstance(value, bool):
            yield f"{where}.{name}={value}: allowed are {', '.join(map(str, _OVERRIDES[name]))}."
