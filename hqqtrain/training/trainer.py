"""A plain training loop, the same under every strategy and at every world size.

The global batch of a step does not depend on the ranks: its sequences are a function of the seed
and of its index. Rank r takes the sequences r, r + world size, ..., and the loss is averaged over
the tokens of all ranks. So one process and eight have the same training curve up to rounding. A run
that resumes after a kill repeats the uninterrupted run bit for bit.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.data.layout import Batch
from hqqtrain.data.loader import DataLoader
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import copy_from_full, reshard
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import peak_memory_bytes
from hqqtrain.training.engine import Engine
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.nonfinite import NonFiniteGuard
from hqqtrain.training.optimizer import LearningRateSchedule
from hqqtrain.training.state import StepResult, TrainState


class Trainer:
    """Trains `trainable_parameters`. It writes no file and logs no metric.

    Args:
        engine: Runs backward passes and optimizer steps.
        trainable_parameters: Parameters that the engine trains, by PEFT's names.
        loader: The training data.
        loss: Loss of the engine's model on a micro-batch.
        schedule: Learning rate of each step.
        guard: Decides about steps whose loss or gradient is not finite.
        comm: All ranks of the run.
        preemption: Knows whether this rank was asked to stop.
        seed: `train.seed`.
        after_step: Functions that are called after each step that was taken, on all ranks.
        unchanged: Makes the context of the passes of a step, during which no parameter changes.
    """

    def __init__(
        self, engine: Engine, trainable_parameters: Mapping[str, nn.Parameter],
        loader: DataLoader, loss: ModelLoss, schedule: LearningRateSchedule,
        guard: NonFiniteGuard, comm: Communicator, preemption: PreemptionHandler, seed: int = 0,
        after_step: Sequence[Callable[[], object]] = (),
        unchanged: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self.engine, self.trainable_parameters = engine, trainable_parameters
        self.loader, self.loss, self.schedule, self.guard = loader, loss, schedule, guard
        self.comm, self.preemption, self.seed = comm, preemption, seed
        self._after_step, self._unchanged = after_step, unchanged
        self.state = TrainState()
        self.stop_requested = False  # whether any rank was asked to stop during the last step
        self.stopped_early = False  # set by the caller, who knows when training stops to help

    @property
    def is_over(self) -> bool:
        """Whether all steps have been taken, or the training has stopped early."""
        return self.stopped_early or self.state.steps >= self.loader.total_steps

    def run(self, roll_back: Callable[[], object]) -> Iterator[StepResult]:
        """Train to the end and yield the result of every step that was taken. Collective.

        `roll_back` loads an earlier state of this trainer.
        """
        self.engine.model.train()
        while not self.is_over:
            if (result := self.step()).was_taken:
                yield result
                continue
            if self.guard.rolls_back:
                roll_back()
            # After a rollback, this also skips the batches between the checkpoint and this one.
            self.state.skip_to(result.batch_index + 1)

    def step(self) -> StepResult:
        """Train on the next global batch, unless its loss or gradient is not finite. Collective."""
        started, batch_index = time.perf_counter(), self.state.next_batch_index
        seed_dropout(self.seed, batch_index, self.comm.rank)
        batches = list(self.loader.batches(batch_index))
        with self._unchanged():
            target_tokens = self.loader.target_token_count(batch_index)
            loss_sum = self._accumulate_gradients(batches, target_tokens)
        rate = self.schedule.learning_rate(self.state.steps)
        totals = self._sum_over_ranks(loss_sum)
        norm = self.engine.grad_norm(rate)
        self.engine.launch_step(rate, totals[0])
        result = self._read_step(totals, norm, rate, batch_index)
        result.was_taken = self.guard.allows_step(result)
        if result.was_taken:
            self.engine.step(result.learning_rate)
            result.seconds = time.perf_counter() - started
            self.preemption.record_step_seconds(result.seconds)
            self.state.add(result)
            for function in self._after_step:
                function()
        else:
            gradient = self.engine.first_nonfinite_gradient()
            self.engine.skip_step()
            self.guard.handle_refused(result, gradient, self.engine.model, batches)
        return result

    def _accumulate_gradients(self, batches: Sequence[Batch], global_tokens: int) -> Tensor:
        """Add up the gradients of this rank's micro-batches, and return the sum of their losses.

        Args:
            batches: The micro-batches of this rank.
            global_tokens: Number of tokens that the loss predicts in the global batch.
        """
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.comm.device)
        for index, batch in enumerate(batches):
            with self.engine.accumulating(last=index == len(batches) - 1):
                loss, _ = self.loss(batch)
                # The loss is a sum over tokens, and the engine averages gradients over ranks. With
                # this factor, the result is the gradient of the mean over all global tokens.
                self.engine.backward(loss * (self.comm.size / max(1, global_tokens)))
            loss_sum += loss.detach().double()
        return loss_sum

    def _sum_over_ranks(self, loss_sum: Tensor) -> Tensor:
        """Combine the ranks' losses, requests to stop and peak memory, in one all-reduce.

        Only sums are reduced, so each rank has a slot of its own for its peak memory. The result is
        on the device.
        """
        peaks_of_ranks = [0] * self.comm.size
        peaks_of_ranks[self.comm.rank] = peak_memory_bytes(self.comm.device)
        asks_to_stop = bool(self.preemption.stop_reason)
        others = self.comm.to_device([asks_to_stop, *peaks_of_ranks])
        return self.comm.sum_on_device(torch.cat([loss_sum.reshape(1), others]))

    def _read_step(self, totals: Tensor, norm: Tensor, rate: float, batch_index: int) -> StepResult:
        """Read loss, requests to stop, peak memory and gradient norm from the device.

        This is the only time in a step that the host waits for the device.
        """
        values = torch.cat([norm.to(totals).reshape(1), totals]).tolist()
        grad_norm, loss, stop_requests, *peaks = values
        self.stop_requested = stop_requests > 0
        tokens = self.loader.target_token_count(batch_index)
        return StepResult(
            self.state.steps + 1, batch_index, tokens, loss / max(1, tokens), rate,
            max(peaks) / 2**30, grad_norm, all_tokens=self.loader.token_count(batch_index),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values, and as `tensors` this rank's shards of all tensors."""
        return {
            "step": self.state.steps,
            "trained": asdict(self.state),
            "updates": self.engine.step_count,
            "scaler": self.engine.scaler_state(),
            "tensors": self.engine.local_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, after its `tensors` were gathered into full tensors.

        The trainable parameters may be absent in it if the model has their values already.
        """
        tensors: Mapping[str, Tensor] = state["tensors"]
        self.load_parameters(tensors)
        self.engine.load_optimizer(tensors, state["updates"])
        self.engine.load_scaler(state["scaler"])
        self.state = TrainState(**state["trained"])

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy full tensors by name into the trainable parameters that they name. Collective."""
        reshard(self.engine.model)
        for name, param in self.trainable_parameters.items():
            if name in tensors:
                copy_from_full(param, tensors[name])


def seed_dropout(seed: int, batch_index: int, rank: int) -> None:
    """Seed dropout by a hash of the arguments, so that a checkpoint needs no generator state."""
    digest = hashlib.blake2b(f"{seed} {batch_index} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
