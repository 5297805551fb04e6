"""The training loop: plain, over `accelerate.Accelerator`, the same at every world size.

A step always sees the same global batch: its sequences are a function of seed and place in the
data, each rank takes every world-size-th of them, and the loss is weighted by token over all ranks.
So one process and eight walk the same path, but for rounding, and a process that goes on where
another was killed walks it to the bit.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from hqqtrain.config import RunConfig
from hqqtrain.data import SampleOrder, Sequences, collate
from hqqtrain.dist import Sentinel
from hqqtrain.models import adapter_name
from hqqtrain.train.checkpointing import checkpoint_layers
from hqqtrain.train.engine import Engine
from hqqtrain.train.evaluation import Batch
from hqqtrain.train.flops import utilisation
from hqqtrain.train.loss import NextTokenLoss
from hqqtrain.train.nonfinite import Guard
from hqqtrain.train.optimizer import learning_rate
from hqqtrain.train.progress import Step, Trained
from hqqtrain.train.session import Session
from hqqtrain.train.torch_engine import TorchEngine
from hqqtrain.train.zero3_engine import ZeRO3Engine

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the parameters of `model` that ask for a gradient.

    Args:
        model: as `mount` leaves it.
        sequences: packed training text.
        guard: decides about steps that are not finite.
    """

    def __init__(self, config: RunConfig, model: nn.Module, sequences: Sequences,
                 session: Session, guard: Guard) -> None:  # fmt: skip
        self.config, self.sequences = config, sequences
        self.session, self.guard = session, guard
        self.processes, self.accelerator = session.processes, session.accelerator
        self.trained = {adapter_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        if config.train.checkpointing:
            checkpoint_layers(
                model, offload=session.offloads_activations, frees=session.strategy == "zero3"
            )
        self.share = utilisation(model, session.device_name, self.processes.size)
        self.bare_model = model
        self.order = SampleOrder(len(sequences), config.train.seed)
        self.steps = total_steps(config, self.order)
        _warn_of_warmup(config, self.steps)
        kind = ZeRO3Engine if session.strategy == "zero3" else TorchEngine
        self.engine: Engine = kind(model, self.trained, session)
        tokens = config.train.micro_batch_size * config.train.max_seq_len
        may_take_parts = session.strategy != "zero3"
        self.loss = NextTokenLoss(self.engine.model, tokens, self.processes, may_take_parts)
        self.done = Trained()
        self.is_asked_to_stop = False
        """Any rank was, when the last step was taken: the same on all."""

    def run(self, roll_back: Callable[[], None] = lambda: None) -> Iterator[tuple[int, dict]]:
        """Trains to the end; yields (step, metrics) after every step, counted from 1.

        `roll_back` puts an earlier state of this trainer back.
        """
        self.engine.model.train()
        every = self.config.parallel.check_every
        sentinel = Sentinel(self.bare_model, self.processes) if every else None
        while self.done.steps < self.steps:
            began, place = time.perf_counter(), self.done.place
            rate = learning_rate(self.config.optim, self.done.steps, self.steps)
            step = self._step(place, rate)
            if not step.taken:
                self._leave_out(place, roll_back)
                continue
            seconds = time.perf_counter() - began
            self.session.interrupt.step_took(seconds)
            self.done.add(step, seconds)
            if sentinel and every and (self.done.steps % every == 0 or self.is_over):
                sentinel.check()
            yield self.done.steps, self._metrics(step, rate) | self._speed(step.tokens / seconds)
        if sentinel and sentinel.checks:
            sentinel.report(self.done.seconds)

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken."""
        return self.done.steps >= self.steps

    def _step(self, place: int, rate: float) -> Step:
        """One optimizer step with the global batch at `place` in the data."""
        _seed(self.config.train.seed, place, self.processes.rank)
        indices = self.order.indices(place, self.config.train.global_batch_size)
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
        asked = bool(self.session.interrupt.reason)
        summed, stop = self.processes.sum([total.item(), asked])
        self.is_asked_to_stop = stop > 0
        step = Step(self.done.steps + 1, place, indices, tokens, summed / max(1, tokens))

        def accepts(norm: float) -> bool:
            step.norm = norm
            step.taken = self.guard.accepts(step, self.engine)
            return step.taken

        self.engine.update(rate, accepts)
        if not step.taken:
            self.guard.refuse(step, self.engine.model, batches)
        return step

    def _leave_out(self, place: int, roll_back: Callable[[], None]) -> None:
        if self.config.train.on_nonfinite == "rollback":
            roll_back()
        self.done.skipped = place + 1 - self.done.steps

    def _micro_batches(self, indices: list[int]) -> Iterator[Batch]:
        mine = indices[self.processes.rank :: self.processes.size]
        size = self.config.train.micro_batch_size
        for start in range(0, len(mine), size):
            batch = collate([self.sequences[i] for i in mine[start : start + size]])
            yield {k: v.to(self.processes.device, non_blocking=True) for k, v in batch.items()}

    def _speed(self, rate: float) -> dict[str, float]:
        speed = {"train/tokens_per_second": rate}
        return speed | {"train/mfu": rate * self.share} if self.share else speed

    def _metrics(self, step: Step, rate: float) -> dict[str, float]:
        passed = self.order.epoch(self.done.place, self.config.train.global_batch_size)
        return {
            "train/loss": step.loss,
            "train/grad_norm": step.norm,
            "train/learning_rate": rate,
            "train/epoch": passed,
            "train/global_step": self.done.steps,
        }


def _seed(seed: int, place: int, rank: int) -> None:
    """Of dropout alone: a function of these three, so that there is no state to save."""
    digest = hashlib.blake2b(f"{seed} {place} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


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
