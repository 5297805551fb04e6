"""Compare the estimate of a run with the memory and disk that are free.

A run that cannot fit is refused; one that may not fit gives a warning. Both name the keys that
reduce the need.
"""

from hqqtrain.config import RunConfig, UserError
from hqqtrain.models.estimate import GIB, SHARDING, Estimate
from hqqtrain.models.memory import Available

TIGHT = 0.9
"""Above this fraction of the free memory, the estimate is too coarse to promise a fit."""

# The parts whose size is exact.
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


def check_fits(estimate: Estimate, free: Available, config: RunConfig, *, local_ranks: int = 1,
               ) -> list[str]:  # fmt: skip
    """Return warnings if memory or disk may not be enough.

    Args:
        estimate: The estimate of the run.
        free: Free memory of one rank's device and of the host, and free disk.
        config: Configuration of the run, for the advice.
        local_ranks: Ranks that share the host's memory.

    Raises:
        UserError: Weights and optimizer alone exceed the free memory, or the results exceed the
            free disk.
    """
    on_host = free.device is None
    room = free.host // local_ranks if free.device is None else free.device  # of one rank
    where = "this machine's memory" if on_host else "the GPU"
    certain = sum(estimate.device[part] for part in _CERTAIN)
    warnings = []
    if certain > room:
        raise UserError(
            f"model.name_or_path={config.model.name_or_path}: weights and optimizer need "
            f"{certain / GIB:.1f} GiB per rank; {where} has {room / GIB:.1f} GiB free. "
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
    """Return what to change after running out of memory: keys and values, most effective first."""
    train, advice = config.train, []
    if config.task == "finetune":
        if not train.checkpointing:
            advice.append("train.checkpointing=true (now false)")
        elif not config.parallel.offloads_activations:
            offload = "all" if config.parallel.offloads_parameters else "activations"
            advice.append(f"parallel.offload={offload} (now {config.parallel.offload})")
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
    if config.parallel.strategy not in SHARDING:
        advice.append("several GPUs with parallel.strategy=fsdp2")
    if not config.parallel.offloads_parameters:
        advice.append("parallel.strategy=fsdp2 with parallel.offload=all")
    return "Out of memory. What helps, most effective first: " + "; ".join(advice) + "."


def _check_disk(estimate: Estimate, free: Available, config: RunConfig) -> list[str]:
    need = sum(estimate.disk.values())
    text = (
        f"run.root={config.run.root}: the results need {need / GIB:.3f} GiB of disk; "
        f"{free.disk / GIB:.3f} GiB are free. Choose another run.root, or quant.save=false."
    )
    if need > free.disk:
        raise UserError(text)
    return [text] if need > TIGHT * free.disk else []


def _advice(parts: dict[str, int], config: RunConfig) -> str:
    """Return the advice for the three largest parts."""
    largest = sorted((p for p in parts if parts[p]), key=lambda p: -parts[p])[:3]
    return "What helps: " + "; ".join(_HELP[p].format(c=config) for p in largest) + "."
