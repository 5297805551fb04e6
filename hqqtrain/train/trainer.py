"""A plain training loop over `accelerate.Accelerator`, the same at every world size.

The global batch of a step does not depend on the ranks: its sequences are a function of the seed
and the position in the data, each rank takes every world-size-th of them, and the loss is averaged
over the tokens of all ranks. So one process and eight have the same training curve up to rounding,
and a run that resumes after a kill repeats the uninterrupted run bit for bit.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from hqqtrain.config.run import RunConfig
from hqqtrain.data.order import SampleOrder
from hqqtrain.data.packing import TokenSequences, collate_batch
from hqqtrain.distributed.consistency import ConsistencyChecker
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import Batch
from hqqtrain.models.fqn import peft_key
from hqqtrain.train.activation_checkpointing import apply_activation_checkpointing
from hqqtrain.train.engine import Engine
from hqqtrain.train.losses.next_token import NextTokenLoss
from hqqtrain.train.mfu import mfu_per_token_rate
from hqqtrain.train.nonfinite import NonFiniteGuard
from hqqtrain.train.optimizer import learning_rate
from hqqtrain.train.state import StepResult, TrainState
from hqqtrain.train.torch_engine import TorchEngine
from hqqtrain.train.zero3_engine import ZeRO3Engine

logger = logging.getLogger(__name__)


class Trainer:
    """Trains the parameters of `model` that require a gradient.

    Args:
        config: The run's configuration.
        model: As `mount` returns it.
        sequences: Packed training text.
        session: Ranks, device, precision and strategy.
        guard: Decides what happens if a loss or a gradient is not finite.
    """

    def __init__(self, config: RunConfig, model: nn.Module, sequences: TokenSequences,
                 runtime: Runtime, guard: NonFiniteGuard) -> None:  # fmt: skip
        self.config, self.sequences = config, sequences
        self.runtime, self.guard = runtime, guard
        self.comm, self.accelerator = runtime.comm, runtime.accelerator
        self.trained = {peft_key(n): p for n, p in model.named_parameters() if p.requires_grad}
        if config.train.activation_checkpointing:
            apply_activation_checkpointing(
                model, offload=runtime.offloads_activations, frees=runtime.strategy == "zero3"
            )
        self.share = mfu_per_token_rate(model, runtime.device_name, self.comm.size)
        self.unwrapped_model = model
        self.order = SampleOrder(len(sequences), config.train.seed)
        self.steps = total_steps(config, self.order)
        _warn_of_warmup(config, self.steps)
        kind = ZeRO3Engine if runtime.strategy == "zero3" else TorchEngine
        self.engine: Engine = kind(model, self.trained, runtime)
        tokens = config.train.micro_batch_size * config.train.max_seq_len
        allow_chunks = runtime.strategy != "zero3"
        self.loss = NextTokenLoss(self.engine.model, tokens, self.comm, allow_chunks)
        self.done = TrainState()
        self.stop_requested = False
        """Whether any rank was asked to stop by the end of the last step; the same on all ranks."""

    def run(self, roll_back: Callable[[], None] = lambda: None) -> Iterator[tuple[int, dict]]:
        """Train to the end and yield (step, metrics) after every step, counted from 1. Collective.

        Args:
            roll_back: Loads an earlier state of this trainer.

        Yields:
            The number of the step and its metrics by name.
        """
        self.engine.model.train()
        every = self.config.parallel.consistency_check_every
        sentinel = ConsistencyChecker(self.unwrapped_model, self.comm) if every else None
        while self.done.steps < self.steps:
            began, place = time.perf_counter(), self.done.place
            rate = learning_rate(self.config.optim, self.done.steps, self.steps)
            step = self._step(place, rate)
            if not step.taken:
                self._skip_batch(place, roll_back)
                continue
            seconds = time.perf_counter() - began
            self.runtime.preemption.record_step_seconds(seconds)
            self.done.add(step, seconds)
            if sentinel and every and (self.done.steps % every == 0 or self.is_over):
                sentinel.check()
            yield self.done.steps, self._metrics(step, rate) | self._speed(step.tokens / seconds)
        if sentinel and sentinel.checks:
            sentinel.report(self.done.seconds)

    @property
    def is_over(self) -> bool:
        """Whether all steps have been taken."""
        return self.done.steps >= self.steps

    def _step(self, place: int, rate: float) -> StepResult:
        """Take one optimizer step with the global batch at position `place` in the data."""
        _seed(self.config.train.seed, place, self.comm.rank)
        # All ranks know the whole global batch, so its token count needs no communication.
        indices = self.order.indices(place, self.config.train.global_batch_size)
        tokens = self.sequences.select(indices).tokens
        total = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        # Gradient accumulation over this rank's micro-batches.
        batches = list(self._micro_batches(indices))
        for number, batch in enumerate(batches):
            with self.engine.accumulation_context(last=number == len(batches) - 1):
                with self.accelerator.autocast():
                    loss = self.loss(batch)
                # The loss is a sum over tokens, and the engine averages gradients over ranks. This
                # factor makes the gradient that of the mean over the global batch's tokens.
                self.engine.backward(loss * (self.comm.size / max(1, tokens)))
            total += loss.detach().double()
        # One all-reduce for the loss and for "was any rank asked to stop?".
        asked = bool(self.runtime.preemption.reason)
        summed, stop = self.comm.sum([total.item(), asked])
        self.stop_requested = stop > 0
        step = StepResult(self.done.steps + 1, place, indices, tokens, summed / max(1, tokens))

        # The engine calls back with the gradient norm before it steps, where it can, so that a norm
        # that is not finite never reaches the weights.
        def accepts(norm: float) -> bool:
            step.norm = norm
            step.taken = self.guard.accepts(step, self.engine)
            return step.taken

        self.engine.update(rate, accepts)
        if not step.taken:
            # Find the layer by running the batches again, then raise or skip the batch.
            self.guard.refuse(step, self.engine.model, batches)
        return step

    def _skip_batch(self, place: int, roll_back: Callable[[], None]) -> None:
        """Continue after the batch at `place`, from the last checkpoint if the policy says so."""
        if self.config.train.on_nonfinite == "rollback":
            roll_back()
        # Also skips the batches between the checkpoint and `place`.
        self.done.skipped = place + 1 - self.done.steps

    def _micro_batches(self, indices: list[int]) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the global batch, on the device."""
        own = indices[self.comm.rank :: self.comm.size]
        size = self.config.train.micro_batch_size
        for start in range(0, len(own), size):
            batch = collate_batch([self.sequences[i] for i in own[start : start + size]])
            yield {k: v.to(self.comm.device, non_blocking=True) for k, v in batch.items()}

    def _speed(self, rate: float) -> dict[str, float]:
        speed = {"train/tokens_per_second": rate}
        return speed | {"train/mfu": rate * self.share} if self.share else speed

    def _metrics(self, step: StepResult, rate: float) -> dict[str, float]:
        epoch = self.order.epoch(self.done.place, self.config.train.global_batch_size)
        return {
            "train/loss": step.loss,
            "train/grad_norm": step.norm,
            "train/learning_rate": rate,
            "train/epoch": epoch,
            "train/global_step": self.done.steps,
        }


def _seed(seed: int, place: int, rank: int) -> None:
    """Seed dropout as a function of its arguments, so that no generator state needs saving."""
    digest = hashlib.blake2b(f"{seed} {place} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


def _warn_of_warmup(config: RunConfig, steps: int) -> None:
    if 0 < steps <= config.optim.warmup_steps:
        logger.warning(
            "optim.warmup_steps=%d: the run has %d steps, so it never reaches optim.lr",
            config.optim.warmup_steps, steps,
        )  # fmt: skip


def total_steps(config: RunConfig, order: SampleOrder) -> int:
    """Return `train.max_steps`, or the number of steps in `train.epochs`, at least one."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    return order.steps(config.train.epochs, config.train.global_batch_size)
