"""The training loop: plain, over `accelerate.Accelerator`, the same at every world size.

A step always sees the same global batch: its sequences are a function of seed and step, each
rank takes every world-size-th of them, and the loss is weighted by token over all ranks. So
one process and eight walk the same path, but for rounding.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from hqqtrain.config import RunConfig, UserError
from hqqtrain.data import SampleOrder, Sequences, collate
from hqqtrain.dist import Sentinel
from hqqtrain.train.checkpointing import checkpoint_layers
from hqqtrain.train.engine import build_engine
from hqqtrain.train.evaluation import Batch
from hqqtrain.train.flops import utilisation
from hqqtrain.train.loss import NextTokenLoss
from hqqtrain.train.session import Session

logger = logging.getLogger(__name__)


@dataclass
class Trained:
    """What a training leaves beside the weights."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """Of the last step."""

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.loss = loss


class Trainer:
    """Trains the parameters of `model` that ask for a gradient.

    Args:
        model: as `mount` leaves it.
        sequences: packed training text.
    """

    def __init__(self, config: RunConfig, model: nn.Module, sequences: Sequences,
                 session: Session) -> None:  # fmt: skip
        self.config, self.sequences = config, sequences
        self.processes, self.accelerator = session.processes, session.accelerator
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if config.train.checkpointing:
            checkpoint_layers(
                model, offload=session.offloads_activations, frees=session.strategy == "zero3"
            )
        self.share = utilisation(model, session.device_name, self.processes.size)
        self.bare_model = model
        self.order = SampleOrder(len(sequences), config.train.seed)
        self.steps = total_steps(config, self.order)
        _warn_of_warmup(config, self.steps)
        self.engine = build_engine(model, self.parameters, self.steps, session)
        tokens = config.train.micro_batch_size * config.train.max_seq_len
        may_take_parts = session.strategy != "zero3"
        self.loss = NextTokenLoss(self.engine.model, tokens, self.processes, may_take_parts)
        self.done = Trained()

    def run(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Trains to the end; yields (step, metrics) after every step, counted from 1."""
        self.engine.model.train()
        every = self.config.parallel.check_every
        sentinel = Sentinel(self.bare_model, self.processes) if every else None
        for step in range(self.steps):
            began, rate = time.perf_counter(), self.engine.rate
            loss, tokens, norm = self.step(step)
            seconds = time.perf_counter() - began
            self.done.add(loss, tokens, seconds)
            if sentinel and every and ((step + 1) % every == 0 or step + 1 == self.steps):
                sentinel.check()
            yield step + 1, self._metrics(norm, rate) | self._speed(tokens / seconds)
        if sentinel:
            share = 100 * sentinel.seconds / max(self.done.seconds, 1e-9)
            agreed = "ranks agree and " if sentinel.compares else ""
            logger.info(
                "%sfrozen bits are unchanged: looked %d times, %.2f %% of the time",
                agreed, sentinel.checks, share,
            )  # fmt: skip

    def step(self, step: int) -> tuple[float, int, float]:
        """One optimizer step: (mean loss over the global batch, its tokens, gradient norm)."""
        indices = self.order.indices(step, self.config.train.global_batch_size)
        tokens = self.sequences.select(indices).tokens
        total = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        batches = list(self._micro_batches(indices))
        for number, batch in enumerate(batches):
            with self.engine.accumulating(last=number == len(batches) - 1):
                with self.accelerator.autocast():
                    loss = self.loss(batch)
                # Gradients are averaged over ranks; the loss is a sum over tokens.
                self.engine.backward(loss * (self.processes.size / max(1, tokens)))
            total += loss.detach().double()
        mean = self.processes.sum([total.item()])[0] / max(1, tokens)
        norm = self.engine.update()
        self._check_finite(step, mean, norm)
        return mean, tokens, norm

    def _micro_batches(self, indices: list[int]) -> Iterator[Batch]:
        mine = indices[self.processes.rank :: self.processes.size]
        size = self.config.train.micro_batch_size
        for start in range(0, len(mine), size):
            batch = collate([self.sequences[i] for i in mine[start : start + size]])
            yield {k: v.to(self.processes.device, non_blocking=True) for k, v in batch.items()}

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        scaled = self.accelerator.scaler is not None  # fp16 skips steps that overflow by itself
        if math.isfinite(loss) and (math.isfinite(norm) or scaled):
            return
        raise UserError(
            f"train.on_nonfinite=stop: loss {loss}, gradient norm {norm} at step {step + 1}; lower "
            f"optim.lr={self.config.optim.lr}, raise optim.warmup_steps, or use "
            "train.precision=fp32."
        )

    def _speed(self, rate: float) -> dict[str, float]:
        speed = {"train/tokens_per_second": rate}
        return speed | {"train/mfu": rate * self.share} if self.share else speed

    def _metrics(self, norm: float, rate: float) -> dict[str, float]:
        steps = self.done.steps
        return {
            "train/loss": self.done.loss,
            "train/grad_norm": norm,
            "train/learning_rate": rate,
            "train/epoch": self.order.epoch(steps, self.config.train.global_batch_size),
            "train/global_step": steps,
        }


def _warn_of_warmup(config: RunConfig, steps: int) -> None:
    if 0 < steps <= config.optim.warmup_steps:
        logger.warning(
            "optim.warmup_steps=%d: the run has %d steps, so it never reaches optim.lr",
            config.optim.warmup_steps, steps,
        )  # fmt: skip


def total_steps(config: RunConfig, order: SampleOrder) -> int:
    """`train.max_steps`, or as many as `train.epochs` take, at least one."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return order.steps(config.train.epochs, config.train.global_batch_size)
