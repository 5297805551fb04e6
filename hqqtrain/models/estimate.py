"""How much memory and disk a run will need, from shapes alone, before any weight is read.

An estimate, said to be one: weights, gradients and optimizer state are exact; activations
follow the formula of `_activations`. What surely does not fit is refused, with the keys that
help; what may not fit is a warning.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from hqqtrain.config import RunConfig, UserError
from hqqtrain.models.memory import Available
from hqqtrain.models.names import base_model, expected_shapes, is_adapter
from hqqtrain.nn import PACKED, HQQLinear

GIB = 2**30
TIGHT = 0.9
"""Above this share of what is free, the estimate is too coarse to promise a fit."""
LOGIT_SLICE = 2048
"""Tokens whose logits an evaluation holds in fp32 at a time."""
TRAINED_LOGITS = 1 << 24
"""Logits that the training's loss holds at a time."""

_CERTAIN = ("packed weights", "dense weights", "adapter and optimizer", "reference model")
_HELP = {
    "packed weights": "lower quant.nbits={c.quant.nbits}, or more GPUs with "
    "parallel.strategy=fsdp2",
    "dense weights": "more GPUs with parallel.strategy=fsdp2, or a shorter quant.skip",
    "reference model": "eval.reference=off",
    "adapter and optimizer": "optim.name=paged_adamw_8bit, "
    "adapter.dtype=bf16 or a smaller adapter.r={c.adapter.r}",
    "activations": "a smaller train.micro_batch_size={c.train.micro_batch_size} or "
    "train.max_seq_len={c.train.max_seq_len}, and train.checkpointing=true with "
    "parallel.offload=activations",
    "logits": "a smaller train.micro_batch_size={c.train.micro_batch_size} or "
    "train.max_seq_len={c.train.max_seq_len}",
    "working memory": "more GPUs with parallel.strategy=fsdp2",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for: of one rank's device, of what it offloads to the host, and of the
    run's directory on disk."""

    device: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    host: int = 0

    def __str__(self) -> str:
        parts = (f"{k} {v / GIB:.2f}" for k, v in self.device.items() if v)
        memory, disk = sum(self.device.values()) / GIB, sum(self.disk.values()) / GIB
        return f"memory a rank {memory:.2f} GiB ({', '.join(parts)}), disk {disk:.2f} GiB"


def estimate(config: RunConfig, model: nn.Module, *, dtype: torch.dtype, world_size: int = 1,
             strategy: str = "single", on_gpu: bool = False) -> Estimate:  # fmt: skip
    """The needs of one rank, from `model` on meta: HQQLinears in place, adapters injected.

    `dtype`: of activations and unquantized weights. Sharded, parameters, gradients and optimizer
    state are divided by `world_size` (under `fsdp1` not the adapters'); the largest layer is whole,
    twice (prefetch), and so is what lies outside of layers, as embeddings do, which FSDP keeps
    whole from then on. `on_gpu`: what `parallel.offload` says is in the host's memory, which is
    not counted.
    """
    sizes, parallel = _Sizes.of(model, dtype), config.parallel
    shards = world_size if strategy in ("fsdp2", "fsdp1", "zero3") else 1
    trained_shards = 1 if strategy == "fsdp1" else shards
    finetune, measures = config.task == "finetune", config.eval.source is not None
    tokens = config.train.micro_batch_size * config.train.max_seq_len
    kept = not (on_gpu and parallel.offloads_activations)
    parameters = {
        "packed weights": sizes.packed // shards,
        "dense weights": sizes.dense // shards,
        "adapter and optimizer": _trained(config, sizes) // trained_shards if finetune else 0,
        "reference model": _reference(config, sizes, dtype) // shards if measures else 0,
    }
    gathered, host = sizes.root * (shards - 1) // shards, 0
    if on_gpu and parallel.offloads_parameters:
        gathered, host = sizes.root, sum(parameters.values())
        parameters = dict.fromkeys(parameters, 0)
    device = parameters | {
        "activations": _activations(config, model, dtype, tokens, kept) if finetune else 0,
        "logits": _logits(model, dtype, tokens, finetune, measures, whole=strategy == "zero3"),
        "working memory": _working(sizes, shards, dtype) + gathered,
    }
    return Estimate(device, _disk(config, sizes, dtype), host)


def check_fits(estimate: Estimate, free: Available, config: RunConfig, *, local_ranks: int = 1,
               ) -> list[str]:  # fmt: skip
    """Warnings where it is tight. Raises UserError where weights alone exceed what is free.

    `local_ranks`: ranks that share this machine's memory (and whose device is the host).
    """
    on_host = free.device is None
    room = free.host // local_ranks if free.device is None else free.device
    where = "this machine's memory" if on_host else "the GPU"
    certain = sum(estimate.device[part] for part in _CERTAIN)
    warnings = []
    if certain > room:
        raise UserError(
            f"model.name_or_path={config.model.name_or_path}: weights and optimizer need "
            f"{certain / GIB:.1f} GiB a rank; {where} has {room / GIB:.1f} GiB free. "
            f"{_advice(estimate.device, config)}"
        )
    if estimate.host * local_ranks > free.host:
        raise UserError(
            f"parallel.offload={config.parallel.offload}: {local_ranks} ranks would keep "
            f"{estimate.host * local_ranks / GIB:.1f} GiB on the host, which has "
            f"{free.host / GIB:.1f} GiB free. Use more nodes, or a smaller "
            f"quant.nbits={config.quant.nbits}."
        )
    if sum(estimate.device.values()) > TIGHT * room:
        warnings.append(
            f"{where} may not be enough: {estimate}; free {room / GIB:.2f} GiB. "
            f"{_advice(estimate.device, config)}"
        )
    return warnings + _check_disk(estimate, free, config)


def oom_advice(config: RunConfig) -> str:
    """What to change after the memory ran out: keys with their values, what helps most first."""
    train, advice = config.train, []
    if config.task == "finetune":
        if not train.checkpointing:
            advice.append("train.checkpointing=true (now false)")
        elif not config.parallel.offloads_activations:
            wanted = "all" if config.parallel.offloads_parameters else "activations"
            advice.append(f"parallel.offload={wanted} (now {config.parallel.offload})")
        if train.micro_batch_size > 1:
            advice.append(f"a smaller train.micro_batch_size (now {train.micro_batch_size}); the "
                          "global batch and the result stay the same")  # fmt: skip
        if config.optim.name != "paged_adamw_8bit":
            advice.append(f"optim.name=paged_adamw_8bit (now {config.optim.name})")
    if config.eval.source and config.eval.reference == "resident":
        advice.append("eval.reference=off (now resident: the full-precision model is in memory)")
    advice.append(f"a smaller train.max_seq_len (now {train.max_seq_len})")
    if config.quant.nbits > 1:
        advice.append(f"a smaller quant.nbits (now {config.quant.nbits})")
    if config.parallel.strategy not in ("fsdp2", "fsdp1", "zero3"):
        advice.append("several GPUs with parallel.strategy=fsdp2")
    if not config.parallel.offloads_parameters:
        advice.append("parallel.strategy=fsdp2 with parallel.offload=all, which is slower")
    return "Out of memory. What helps, most first: " + "; ".join(advice) + "."


@dataclass(frozen=True)
class _Sizes:
    """Bytes (and, of adapters, numbers) over the whole model."""

    packed: int
    dense: int
    adapter: int
    root: int
    """Bytes of what lies outside of the decoder layers."""
    source: int
    """Weights of the full-precision model, a number."""
    largest: int
    """Weights of the largest quantized linear."""

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "_Sizes":
        packed = dense = adapter = root = 0
        for name, param in model.named_parameters():
            if is_adapter(name):
                adapter += param.numel()
            elif name.rpartition(".")[2] in PACKED:
                packed += param.numel() * param.element_size()
            else:
                dense += param.numel() * dtype.itemsize
                if not any(part.isdigit() for part in name.split(".")):
                    root += param.numel() * dtype.itemsize
        shapes = expected_shapes(model).values()
        linears = [m.layout for m in model.modules() if isinstance(m, HQQLinear)]
        largest = max((a.out_features * a.in_features for a in linears), default=0)
        return cls(packed, dense, adapter, root, sum(map(_count, shapes)), largest)


def _trained(config: RunConfig, sizes: _Sizes) -> int:
    """Adapters, gradients and AdamW's two moments: torch's in the adapters' dtype, bitsandbytes'
    in 8 or 32 bits."""
    number = _adapter_bytes(config)
    moments = {"adamw": 2 * number, "paged_adamw": 8}.get(config.optim.name, 2)
    return sizes.adapter * (2 * number + moments)


def _adapter_bytes(config: RunConfig) -> int:
    return 2 if config.adapter.dtype == "bf16" else 4


def _reference(config: RunConfig, sizes: _Sizes, dtype: torch.dtype) -> int:
    return sizes.source * dtype.itemsize if config.eval.reference == "resident" else 0


def _activations(
    config: RunConfig, model: nn.Module, dtype: torch.dtype, tokens: int, kept: bool
) -> int:
    """Bytes that the backward pass needs of `tokens` tokens.

    A decoder layer keeps, per token, input and output of each of its linears (the adapters',
    the attention's and the MLP's operands) and two fp32 copies of the stream for its norms.
    With checkpointing: the stream before each layer, if it is `kept` here, and one layer in full.
    """
    hf = base_model(model).config.get_text_config()
    layers, hidden = hf.num_hidden_layers, hf.hidden_size
    linears = [m.layout for m in base_model(model).modules() if isinstance(m, HQQLinear)]
    widths = sum(layout.in_features + layout.out_features for layout in linears)
    layer = tokens * (widths * dtype.itemsize // max(1, layers) + 2 * 4 * hidden)
    if not config.train.checkpointing:
        return layers * layer
    return (layers if kept else 1) * tokens * hidden * dtype.itemsize + layer


def _logits(
    model: nn.Module, dtype: torch.dtype, tokens: int, training: bool, measures: bool,
    whole: bool,
) -> int:  # fmt: skip
    """Training, up to TRAINED_LOGITS unless `whole`: logits and their gradient, and in fp32 a copy,
    its softmax and its gradient. Measuring: two models' logits, and four fp32 tensors of a slice.
    """
    vocabulary = base_model(model).config.get_text_config().vocab_size
    measuring = 2 * tokens * dtype.itemsize + 4 * 4 * min(tokens, LOGIT_SLICE)
    most = vocabulary * tokens
    trained = (most if whole else min(most, TRAINED_LOGITS)) * (2 * dtype.itemsize + 12)
    return max(vocabulary * measuring if measures else 0, trained if training else 0)


def _working(sizes: _Sizes, shards: int, dtype: torch.dtype) -> int:
    """Quantizing a rank's share of one linear (two weights as they are read, and codes), or
    computing with one (dequantized, and cast for the product), whichever is more."""
    quantizing = (2 * dtype.itemsize + 2) * sizes.largest // shards
    return max(quantizing, 2 * dtype.itemsize * sizes.largest)


def _disk(config: RunConfig, sizes: _Sizes, dtype: torch.dtype) -> dict[str, int]:
    quantizes = config.task in ("finetune", "quantize") and config.quant.save
    return {
        "quantized/": sizes.packed + sizes.dense if quantizes else 0,
        "adapter/": _adapter_bytes(config) * sizes.adapter if config.task == "finetune" else 0,
        "export": sizes.source * dtype.itemsize if config.task == "export" else 0,
    }


def _check_disk(estimate: Estimate, free: Available, config: RunConfig) -> list[str]:
    need = sum(estimate.disk.values())
    text = (
        f"run.root={config.run.root}: the results need {need / GIB:.1f} GiB of disk, "
        f"{free.disk / GIB:.1f} GiB are free. Choose another run.root, or quant.save=false."
    )
    if need > free.disk:
        raise UserError(text)
    return [text] if need > TIGHT * free.disk else []


def _advice(parts: dict[str, int], config: RunConfig) -> str:
    largest = sorted((p for p in parts if parts[p]), key=lambda p: -parts[p])[:3]
    return "What helps: " + "; ".join(_HELP[p].format(c=config) for p in largest) + "."


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
