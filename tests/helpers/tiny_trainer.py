"""A trainer of a tiny model in one process."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hqqtrain.checkpoint.snapshot import StateSnapshot
from hqqtrain.config.groups import OptimConfig, TrainConfig
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.losses.next_token import NextTokenLoss
from hqqtrain.training.nonfinite import NonFiniteGuard
from hqqtrain.training.optimizer import LearningRateSchedule, trainable_parameters
from hqqtrain.training.torch_engine import TorchEngine
from hqqtrain.training.trainer import Trainer

STEPS = 6


def _sequences() -> TokenSequences:
    stream = (np.arange(9 * 12) * 7 % 32).astype(np.int32)
    starts = np.arange(0, len(stream), 12)
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, starts, starts + 12)


def make_trainer(
    policy: str = "stop", record: Callable[..., object] = lambda *_: None, *,
    comm: Communicator = SINGLE_PROCESS, **train: Any,
) -> Trainer:  # fmt: skip
    """Build the same trainer each time; it trains LoRA adapters of a model with dropout."""
    settings = {"max_steps": STEPS, "global_batch_size": 3, "micro_batch_size": 2, "seed": 5}
    config, optim = TrainConfig(**settings | train), OptimConfig(lr=0.05, warmup_steps=2)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.1)
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(model, lora).to(comm.device)
    trainables = trainable_parameters(model)
    loader = PackedLoader(_sequences(), config, device=comm.device)
    engine = TorchEngine(model, trainables, Accelerator(cpu=True), optim, max_grad_norm=1.0)
    loss = ModelLoss(model, NextTokenLoss(), comm, max_tokens=24)
    return Trainer(
        engine, trainables, loader, loss, LearningRateSchedule(optim, loader.total_steps),
        NonFiniteGuard(policy, comm, record), comm,
        PreemptionHandler(RunDirConfig()), config.seed,
    )  # fmt: skip


def saved_state(trainer: Trainer) -> dict[str, Any]:
    """Return the trainer's state with full tensors, as a checkpoint has it."""
    state, snapshot = trainer.state_dict(), StateSnapshot(SINGLE_PROCESS)
    snapshot.take(state["tensors"])
    return state | {"tensors": {k: t.clone() for k, t in snapshot.tensors().items()}}


def poison(trainer: Trainer, *batch_indices: int) -> None:
    """Make the loss of these global batches NaN."""
    loss = trainer.loss

    def poisoned(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = loss(batch)
        return total * (math.nan if trainer.state.next_batch_index in batch_indices else 1), count

    trainer.loss = poisoned  # type: ignore[assignment]
