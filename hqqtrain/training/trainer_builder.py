"""Build the trainer of a model, with the fused kernels of `train.fused`.

A run and `hqqtrain.train` build it alike. Kernels and activation checkpointing change the modules
of the model, so they last as long as a context, after which the model is as it was.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from hqqtrain.config.groups import OptimConfig, TrainConfig
from hqqtrain.data.loader import DataLoader
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.loading.workload import Workload
from hqqtrain.models.packed_attention import use_packed_attention
from hqqtrain.nn.replacement import restore_attribute
from hqqtrain.training.checkpointing_policy import apply_checkpointing
from hqqtrain.training.engine_builder import build_engine
from hqqtrain.training.fused_lora import FusedLora, fuse_lora
from hqqtrain.training.fused_modules import fuse_modules
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.losses.registry import FUSED_LOSSES, LOSSES
from hqqtrain.training.nonfinite import NonFiniteGuard, RecordRefusal
from hqqtrain.training.optimizer import LearningRateSchedule, trainable_parameters
from hqqtrain.training.trainer import Trainer

logger = logging.getLogger(__name__)


@contextmanager
def build_trainer(
    model: nn.Module, loader: DataLoader, runtime: Runtime, train: TrainConfig, optim: OptimConfig,
    workload: Workload, *, record_refusal: RecordRefusal, advice: str,
    after_step: Sequence[Callable[[], object]] = (),
) -> Iterator[Trainer]:  # fmt: skip
    """Make the context in which a trainer trains the adapters in `model`. Collective.

    Args:
        model: The model, which the strategy has wrapped. When the context ends, also by an error,
            its modules are as they were, but for the values of the trained parameters.
        loader: The training data.
        runtime: Strategy, device and precision.
        train: Settings of the training.
        optim: Settings of the optimizer.
        workload: The settings that decide about the memory of a step.
        record_refusal: Records a step that was refused because its loss was not finite.
        advice: Where the batch of such a step can be found.
        after_step: Functions that are called after each step that was taken, on all ranks.
    """
    comm, trainables = runtime.comm, trainable_parameters(model)
    with ExitStack() as undo:
        for module in model.modules():
            restore_attribute(module, "training", undo)
        if train.fused != "false":
            _fuse_modules(model, runtime, undo, has_packed_texts=train.packing)
        checkpointing = apply_checkpointing(model, runtime, workload, undo)
        engine = build_engine(model, trainables, runtime, optim, train.max_grad_norm)
        lora = FusedLora()
        if train.fused != "false":  # the engine has added its hooks
            lora = fuse_lora(model, undo)
            logger.info("train.fused=auto: %s", lora)
        guard = NonFiniteGuard(
            train.on_nonfinite, comm, record_refusal, autocast=runtime.training_autocast,
            lr=optim.lr, scales_gradients=runtime.accelerator.scaler is not None, advice=advice,
        )  # fmt: skip
        schedule = LearningRateSchedule(optim, loader.total_steps)
        yield Trainer(
            engine, trainables, loader, _build_loss(engine.model, runtime, train, workload),
            schedule, guard, comm, runtime.preemption, train.seed, (checkpointing, *after_step),
            unchanged=lora.casts.unchanged,
        )  # fmt: skip


def _fuse_modules(
    model: nn.Module, runtime: Runtime, undo: ExitStack, *, has_packed_texts: bool
) -> None:
    """Let `model` use the kernels for its norms, rotary embeddings and attention."""
    is_main = runtime.comm.is_main
    fuse_modules(model, runtime.device, undo, logs=is_main)
    reason = use_packed_attention(model, undo)
    if reason and has_packed_texts and is_main:
        logger.info("texts that share a row get an attention mask: the model %s", reason)


def _build_loss(
    model: nn.Module, runtime: Runtime, train: TrainConfig, workload: Workload
) -> ModelLoss:
    """Build the loss of the engine's model. Collective."""
    # In fp16, a gradient that is not scaled before it is rounded would lose its small parts.
    fuses_loss = train.fused != "false" and runtime.precision != "fp16"
    fused = FUSED_LOSSES.get(train.objective) if fuses_loss else None
    return ModelLoss(
        model, LOSSES[train.objective](), runtime.comm, fused=fused and fused(),
        max_tokens=workload.tokens, autocast=runtime.training_autocast,
        may_call_head_alone=runtime.strategy.may_call_head_alone,
    )  # fmt: skip
