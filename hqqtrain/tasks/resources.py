"""Memory and disk of a run: refuse it if it cannot fit, and give advice if it runs out of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from hqqtrain.common.env import get_local_world_size
from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import FULL_DISK
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.loading.memory_check import available_memory, check_fits, oom_advice
from hqqtrain.loading.memory_estimate import estimate_memory
from hqqtrain.loading.workload import Workload

logger = logging.getLogger(__name__)


def workload_of(
    config: RunConfig,
    *,
    offloads_activations: bool = False,
    is_packed: bool = False,
    has_quantized: bool = False,
    has_checkpoints: bool = False,
    calibrates: bool = True,
) -> Workload:
    """Return the settings of `config` that determine the memory and disk space of the run.

    Args:
        config: Configuration of the run.
        offloads_activations: Whether activations are offloaded from a GPU to the host.
        is_packed: Whether the source is quantized already. Then there is no full-precision model
            to compare with.
        has_quantized: Whether the run's directory already contains quantized/.
        has_checkpoints: Whether the run's directory already contains checkpoints. If so, the run
            needs space for one more: it writes each new one before it deletes an old one.
        calibrates: Whether the model can be calibrated, if the configuration asks for that.
    """
    kept_checkpoints = config.ckpt.keep_last + config.ckpt.num_best
    quant = config.quant
    saves_quantized = config.task in ("finetune", "quantize") and quant.quantizes and quant.save
    calibrates = calibrates and quant.calibrates and not (is_packed or has_quantized)
    evaluates = config.eval.source is not None and config.task in ("finetune", "eval")
    # The full-precision model needs memory of its own only beside a quantized one.
    has_reference = evaluates and quant.quantizes and not is_packed
    context, _ = config.eval.window_shape(config.train.max_seq_len)
    return Workload(
        task=config.task,
        model_name=config.model.name_or_path,
        is_synthetic=config.model.source == "synthetic",
        nbits=config.quant.nbits,
        saves_quantized=saves_quantized and not has_quantized,
        adapter_rank=config.adapter.r,
        adapter_itemsize=2 if config.adapter.dtype == "bf16" else 4,
        optimizer=config.optim.name,
        micro_batch_size=config.train.micro_batch_size,
        max_seq_len=config.train.max_seq_len,
        activation_checkpointing=config.train.activation_checkpointing,
        offload=config.parallel.offload,
        offloads_activations=offloads_activations,
        evaluates=evaluates,
        reference=config.eval.reference if has_reference else "off",
        eval_tokens=config.eval.tokens,
        eval_context=context,
        offloads_meta=config.quant.offload_meta,
        export_format=config.export.format,
        new_checkpoints=1 if has_checkpoints else kept_checkpoints + 1,
        run_root=config.run.root,
        calibration_tokens=config.quant.calibration_tokens if calibrates else 0,
        global_batch_size=config.train.global_batch_size,
        is_fused=_is_fused(config),
    )


def _is_fused(config: RunConfig) -> bool:
    """Whether LoRA blocks compute the linears, where the model allows it."""
    # The hooks of DeepSpeed gather the parameters of each module inside of PEFT's.
    is_plain = config.quant.offload_meta or config.parallel.strategy == "zero3"
    return config.train.fused != "false" and not (config.adapter.dropout or is_plain)


def check_resources(workload: Workload, model: nn.Module, runtime: Runtime) -> None:
    """Estimate memory and disk space; refuse a run that cannot fit, warn if it may not fit.

    Raises:
        UserError: The run does not fit.
    """
    needs = estimate_memory(workload, model, runtime.strategy, dtype=runtime.dtype)
    free = available_memory(runtime.device, Path(workload.run_root))
    local_ranks = get_local_world_size() or 1
    for warning in check_fits(needs, free, workload, local_ranks=local_ranks):
        if runtime.comm.is_main:
            logger.warning(warning)
    if runtime.comm.is_main:
        logger.info("estimate: %s", needs)


@contextmanager
def translate_resource_errors(workload: Workload, strategy: Strategy) -> Iterator[None]:
    """Translate out-of-memory and disk-full errors into UserError; pass on all other errors.

    Raises:
        UserError: Memory or disk space ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # The CPU allocator of PyTorch raises a plain RuntimeError.
        is_out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_out_of_memory and "DefaultCPUAllocator: can't allocate memory" not in str(error):
            raise
        raise UserError(f"{oom_advice(workload, strategy)} ({error})") from error
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"{_full_folder(error, workload.run_root)}: the disk is full ({error}). Free some "
            "space; the same command resumes the run."
        ) from error


def _full_folder(error: OSError, run_root: str) -> str:
    """Return `run.root=...`, or the folder of a file elsewhere, as in a cache, that failed."""
    root, file = Path(run_root).expanduser().resolve(), error.filename
    if not isinstance(file, str) or Path(file).resolve().is_relative_to(root):
        return f"run.root={run_root}"
    return str(Path(file).parent)
