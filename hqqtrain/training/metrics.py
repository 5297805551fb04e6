"""Compute the metrics of an optimizer step, under the names that trackers show.

One of them is model FLOPs utilization (MFU): the fraction of the GPU's peak FLOP/s that training
uses.
"""

from peft.utils import ModulesToSaveWrapper
from torch import nn

from hqqtrain.common.gpus import gpu_of_device
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.training.state import StepResult


def step_metrics(
    step: StepResult, *, epoch: float, mfu_per_token_rate: float | None
) -> dict[str, float]:
    """Return the metrics of a step that was taken.

    Args:
        step: The step.
        epoch: Passes over the data up to and including the step.
        mfu_per_token_rate: MFU of one token per second, as `mfu_per_token_rate` returns it; None if
            it is unknown.
    """
    all_tokens_per_second = step.all_tokens / step.seconds
    metrics = {
        "train/loss": step.loss,
        "train/grad_norm": step.grad_norm,
        "train/learning_rate": step.learning_rate,
        "train/epoch": epoch,
        "train/global_step": step.number,
        "train/tokens_per_second": step.tokens / step.seconds,
        "train/all_tokens_per_second": all_tokens_per_second,
    }
    if mfu_per_token_rate:
        metrics["train/mfu"] = all_tokens_per_second * mfu_per_token_rate
    return metrics | {"memory/peak_gib": step.peak_memory_gib}


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of one device; None if unknown, as for a CPU."""
    gpu = gpu_of_device(device_name)
    return gpu.flops if gpu else None


def flops_per_token(model: nn.Module) -> int:
    """Return the FLOPs to train one token, counting linear layers and no recomputation.

    A frozen layer takes 2 FLOPs per weight in the forward pass and 2 for the gradient of its input.
    A trained layer, such as A and B of an adapter, takes 2 more for the gradient of its weight. The
    matrix products of attention are not counted, because they matter for long sequences only.
    """
    total = 0
    # If a module is trained in full, only PEFT's copy of it computes.
    unused = {m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)}
    for module in model.modules():
        if module in unused:
            continue
        if isinstance(module, HQQLinear):
            total += 4 * module.out_features * module.in_features
        elif isinstance(module, nn.Linear):
            is_trained = module.weight.requires_grad
            total += (6 if is_trained else 4) * module.out_features * module.in_features
    return total


def mfu_per_token_rate(model: nn.Module, device_name: str, world_size: int) -> float | None:
    """Return the MFU of training at one token per second.

    The caller multiplies it by the tokens per second of a step.

    Args:
        model: Quantized or not, with its adapters.
        device_name: As `torch.cuda.get_device_name` returns it.
        world_size: Number of devices.

    Returns:
        A fraction of the peak of all devices; None if the peak is unknown.
    """
    peak = peak_flops(device_name)
    return flops_per_token(model) / (peak * world_size) if peak else None
