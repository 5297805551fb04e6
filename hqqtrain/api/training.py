"""`train`: train adapters in this process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.models.packing_probe import probe_packing
from hqqtrain.models.rope import max_batched_length
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.losses.registry import LOSSES
from hqqtrain.training.nonfinite import NonFiniteGuard
from hqqtrain.training.optimizer import LearningRateSchedule, trainable_parameters
from hqqtrain.training.state import StepResult
from hqqtrain.training.torch_engine import TorchEngine
from hqqtrain.training.trainer import Trainer


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
    seed: int = 0,
    on_step: Callable[[StepResult], object] = lambda _: None,
) -> list[StepResult]:
    """Train the adapter of a model in this process, with the loop of a run.

    The same data and settings give the losses of a run with train.fused=false. There are no
    checkpoints, so it cannot be resumed, and neither fused kernels, several processes nor a
    strategy that shards: the command line has these.

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
                    "max_grad_norm": max_grad_norm, "seed": seed}  # fmt: skip
        config = checked_group(TrainConfig, "train", settings)
        of_optimizer = {"name": optimizer, "lr": lr, "weight_decay": weight_decay,
                        "schedule": schedule, "warmup_steps": warmup_steps}  # fmt: skip
        optim = checked_group(OptimConfig, "optim", of_optimizer)
        trainer = _build_trainer(model, base, data, config, optim)
        was_training, results = model.training, []
        try:
            for step in trainer.run(lambda: None):
                results.append(step)
                on_step(step)
        finally:
            model.train(was_training)
    return results


def _build_trainer(
    model: nn.Module, base: Any, data: TokenSequences, config: TrainConfig, optim: OptimConfig
) -> Trainer:
    """Return the trainer of one process.

    Raises:
        UserError: The model cannot be trained here.
    """
    if get_world_size() > 1:
        raise UserError("one process trains; start several with the command line, docs/scaling.md.")
    trainables = trainable_parameters(model)
    if not trainables:
        raise UserError("model has nothing to train; call add_lora first, or load_quantized with "
                        "is_trainable=True.")  # fmt: skip
    if base.dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"model is in {base.dtype}; cast it with model.to(torch.bfloat16).")
    comm = single_process(model)
    loader = PackedLoader(data, config, device=comm.device, layout=_layout(base, data))
    accelerator = Accelerator()
    engine = TorchEngine(model, trainables, accelerator, optim, max_grad_norm=config.max_grad_norm)
    autocast = _autocast(comm, base.dtype)
    loss = ModelLoss(
        engine.model, LOSSES[config.objective](), comm,
        max_tokens=config.micro_batch_size * config.max_seq_len, autocast=autocast,
    )  # fmt: skip
    guard = NonFiniteGuard(
        config.on_nonfinite, comm, lambda *_: None, autocast=autocast, lr=optim.lr,
        advice="Its sequences are those of `data` in this batch.",
    )  # fmt: skip
    return Trainer(
        engine, trainables, loader, loss, LearningRateSchedule(optim, loader.total_steps), guard,
        comm, PreemptionHandler(RunDirConfig()), config.seed,
    )  # fmt: skip


def _layout(base: Any, data: TokenSequences) -> BatchLayout:
    """Return how texts are arranged in batches, so that the model keeps them apart."""
    is_packed = len(data.split_texts()) > len(data)
    packs = not is_packed or probe_packing(dense_config(base), base).is_isolated
    length = max_batched_length(base)
    return BatchLayout(packs, None if length is not None and length >= data.max_len else length)


def _autocast(comm: Communicator, dtype: torch.dtype) -> Callable[[], AbstractContextManager]:
    """Return what makes the context of forward passes in the dtype of the model."""
    if dtype == torch.float32:
        return nullcontext
    return lambda: torch.autocast(comm.device.type, dtype)
