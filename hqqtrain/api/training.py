"""`train`: train adapters in this process."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hqqtrain.api.arguments import checked_group, named_as_arguments
from hqqtrain.api.evaluation import check_tokens, single_process
from hqqtrain.api.folders import dense_config, transformers_model
from hqqtrain.common.env import get_world_size
from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import OptimConfig, TrainConfig
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.public_function import public_function
from hqqtrain.config.run import RunConfig
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.unsharded import SingleProcess
from hqqtrain.models.packing_probe import probe_packing
from hqqtrain.models.rope import max_batched_length
from hqqtrain.tasks.resources import workload_of
from hqqtrain.training.optimizer import trainable_parameters
from hqqtrain.training.state import StepResult
from hqqtrain.training.trainer_builder import build_trainer


@public_function(model=nn.Module, data=TokenSequences)
def train(
    model: nn.Module,
    data: TokenSequences,
    *,
    max_steps: int | None = None,
    epochs: float = 1.0,
    batch_size: int = 16,
    micro_batch_size: int = 1,
    lr: float = 1e-4,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    max_grad_norm: float | None = 1.0,
    activation_checkpointing: str | int = "auto",
    fused: str | bool = "auto",
    on_nonfinite: str = "stop",
    seed: int = 0,
    on_step: Callable[[StepResult], object] = lambda _: None,
) -> list[StepResult]:
    """Train the adapter of a model in this process, with the loop of a run.

    The same data and settings give the losses of a run. There are no checkpoints, so it cannot be
    resumed, and neither several processes nor a strategy that shards: the command line has these.
    Fused kernels and activation checkpointing change the modules of the model while it trains.
    Afterwards, also after an error, the model is as it was, with other values in its adapter.

    Args:
        model: A model with an adapter, as `add_lora` returns it, in fp32 or bf16 on one device.
            All parameters that require a gradient are trained.
        data: The result of `load_data`.
        max_steps: The number of optimizer steps; it takes precedence over `epochs`.
        epochs: The number of passes over the data.
        batch_size: The number of sequences in an optimizer step.
        micro_batch_size: The largest number of sequences in a forward pass.
        lr: The peak learning rate.
        schedule: `cosine`, `linear` or `constant`, after the warm-up.
        warmup_steps: The number of steps of linear warm-up.
        weight_decay: The decoupled weight decay.
        optimizer: `adamw`, `adamw_8bit`, `paged_adamw` or `paged_adamw_8bit`.
        max_grad_norm: The largest gradient norm, above which gradients are clipped; None: no
            clipping.
        activation_checkpointing: The decoder layers that recompute their activations: `auto`,
            `none`, `full`, `offload` or a number, as `train.activation_checkpointing` of a run.
        fused: Whether to use fused kernels where they exist for the model: `auto` or False.
        on_nonfinite: `stop` or `skip`: whether a batch whose loss or gradient is not finite ends
            the training, or is left out.
        seed: The seed of dropout and of the order of the sequences.
        on_step: Called after each step with its result.

    Returns:
        The result of each step: its loss in nats per token, gradient norm, tokens and seconds.

    Raises:
        UserError: A value is not allowed, nothing in the model is trained, or a loss or gradient is
            not finite.
    """
    with named_as_arguments("train", batch_size="train.global_batch_size", optimizer="optim.name"):
        base = transformers_model(model)
        check_tokens(data, base)
        settings = {"max_steps": max_steps, "epochs": epochs, "global_batch_size": batch_size,
                    "micro_batch_size": micro_batch_size, "max_seq_len": max(2, data.max_len),
                    "max_grad_norm": max_grad_norm, "seed": seed, "on_nonfinite": on_nonfinite,
                    "activation_checkpointing": activation_checkpointing,
                    "fused": "auto" if fused is True else str(fused).lower()}  # fmt: skip
        config = checked_group(TrainConfig, "train", settings)
        of_optimizer = {"name": optimizer, "lr": lr, "weight_decay": weight_decay,
                        "schedule": schedule, "warmup_steps": warmup_steps}  # fmt: skip
        optim = checked_group(OptimConfig, "optim", of_optimizer)
        runtime = _start_runtime(model, base, config)
        loader = PackedLoader(data, config, device=runtime.device, layout=_layout(base, data))
        workload = workload_of(
            RunConfig(train=config, optim=optim), offloads_activations=runtime.offloads_activations
        )
        results = []
        try:
            with build_trainer(
                model, loader, runtime, config, optim, workload, record_refusal=lambda *_: None,
                advice="Its sequences are those of `data` in this batch.",
            ) as trainer:  # fmt: skip
                for step in trainer.run(lambda: None):
                    results.append(step)
                    on_step(step)
        finally:
            model.zero_grad()
    return results


def _start_runtime(model: nn.Module, base: Any, config: TrainConfig) -> Runtime:
    """Return the runtime of one process, in the dtype of the model.

    Raises:
        UserError: The model cannot be trained here, or a setting needs a run.
    """
    if get_world_size() > 1:
        raise UserError("one process trains; start several with the command line, docs/scaling.md.")
    if not trainable_parameters(model):
        raise UserError("model has nothing to train; call add_lora first, or load_quantized with "
                        "is_trainable=True.")  # fmt: skip
    if base.dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"model is in {base.dtype}; cast it with model.to(torch.bfloat16).")
    if config.on_nonfinite == "rollback":
        raise UserError("train.on_nonfinite=rollback: needs the checkpoints of a run; use skip.")
    comm = single_process(model)
    precision = "fp32" if base.dtype == torch.float32 else "bf16"
    return Runtime(
        comm, Accelerator(), SingleProcess(comm), precision=precision, training_precision=precision,
        offloads_activations=comm.device.type == "cuda"
        and config.activation_checkpointing == "offload",
        preemption=PreemptionHandler(RunDirConfig()),
    )  # fmt: skip


def _layout(base: Any, data: TokenSequences) -> BatchLayout:
    """Return how texts are arranged in batches, so that the model keeps them apart."""
    is_packed = len(data.split_texts()) > len(data)
    packs = not is_packed or probe_packing(dense_config(base), base).is_isolated
    length = max_batched_length(base)
    return BatchLayout(packs, None if length is not None and length >= data.max_len else length)
