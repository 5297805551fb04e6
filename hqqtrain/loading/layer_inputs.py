"""Collect statistics of the inputs of linears, one decoder layer after the other.

The calibration text passes through the decoder layers twice: as the full-precision model computes
it, and as the model computes it whose earlier linears are quantized already. The text is cut into
parts of one shape, which the ranks share. Sums over the parts are formed in the order of the parts,
so the statistics have the same bits at any number of ranks and threads.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.models.layerwise import LayerCall, LayerwiseModel
from hqqtrain.quant.calibrated.parallel import iterate_in_order, one_thread
from hqqtrain.quant.calibrated.statistics import InputStatistics

R = TypeVar("R")

MAX_PARTS = 8
"""Number of parts of the calibration text; more ranks than this have none."""


class LayerInputs:
    """The calibration text on its way through the decoder layers.

    Every method is a collective.

    Args:
        layerwise: The dense model. The parameters outside of its decoder layers have values.
        sequences: Calibration text, int64 [sequences, tokens].
        comm: All ranks of the run.
    """

    def __init__(self, layerwise: LayerwiseModel, sequences: Tensor, comm: Communicator) -> None:
        self._layerwise, self._comm = layerwise, comm
        parts = sequences.tensor_split(min(MAX_PARTS, len(sequences)))
        self._num_parts = len(parts)
        self._mine = range(comm.rank, self._num_parts, comm.size)
        self._calls: dict[int, list[LayerCall]] = {}
        # By part: the hidden states before the next decoder layer.
        self._full: dict[int, Tensor] = {}
        self._quantized: dict[int, Tensor] = {}
        # By part: the inputs of the linears of the current layer in the full-precision model.
        self._full_inputs: dict[int, dict[str, Tensor]] = {}
        self._captured = threading.local()
        with comm.raise_on_all_ranks(), one_thread():
            for part in self._mine:
                tokens = {"input_ids": parts[part].to(comm.device)}
                hidden, self._calls[part] = layerwise.start(tokens)
                self._full[part] = self._quantized[part] = hidden

    def run_full(self, index: int, linears: Mapping[str, nn.Module]) -> list[list[str]]:
        """Run a decoder layer with its full-precision weights, and keep the inputs of its linears.

        Args:
            index: The index of the layer.
            linears: Those linears of the layer that will be quantized, by name.

        Returns:
            The names of the linears that are called, in the order of the calls, and grouped: the
            linears of a group have the same input.
        """
        found: dict[int, list[list[str]]] = {}
        with self._comm.raise_on_all_ranks(), self._capture(linears):
            run = partial(self._run, index, self._full)
            for part, (hidden, inputs) in self._over_parts(run):
                by_input: dict[int, list[str]] = {}
                for name, tensor in inputs.items():
                    by_input.setdefault(id(tensor), []).append(name)
                self._full[part], self._full_inputs[part] = hidden, inputs
                found[part] = list(by_input.values())
        of_ranks = self._comm.all_gather_object(found)
        merged = {part: groups for of_rank in of_ranks for part, groups in of_rank.items()}
        # A text that reaches other experts calls other linears, so all parts are looked at.
        result: list[list[str]] = []
        for _, groups in sorted(merged.items()):
            known = {name for group in result for name in group}
            result += [new for group in groups if (new := [n for n in group if n not in known])]
        return result

    def run_quantized(self, index: int) -> None:
        """Run a decoder layer whose linears have their quantized weights."""
        with self._comm.raise_on_all_ranks(), self._capture({}):
            for part, (hidden, _) in self._over_parts(partial(self._run, index, self._quantized)):
                self._quantized[part] = hidden
        self._full_inputs.clear()

    def statistics(
        self, index: int, names: list[str], linear: nn.Linear, *, with_cross: bool
    ) -> InputStatistics:
        """Return the statistics of the input that some linears share, the same on every rank.

        The input in the full-precision model is forgotten.

        Args:
            index: The index of the decoder layer.
            names: The names of the linears, a group that `run_full` has returned.
            linear: The first of them. The linears before it have their quantized weights.
            with_cross: Whether the input in the full-precision model counts, too.

        Raises:
            UserError: An input is NaN or infinite.
        """
        name, device = names[0], self._comm.device
        shape = (1 + with_cross, linear.in_features, linear.in_features)

        def moments(part: int) -> tuple[Tensor, int, bool]:
            """Return [gram, cross], the number of tokens, and whether `cross` makes sense."""
            _, inputs = self._run(index, self._quantized, part, stop_at=name)
            full = [self._full_inputs[part].pop(each, None) for each in names]
            x, f = _as_rows(inputs.get(name)), _as_rows(full[0])
            if x is None:
                return torch.zeros(shape, device=device), 0, f is None
            is_paired = f is not None and f.shape == x.shape
            pairs = [(x, x), (f if f is not None and is_paired else x, x)][: shape[0]]
            result = torch.empty(shape, device=device)
            for one, (a, b) in zip(result, pairs, strict=True):
                one.copy_(_second_moment(a, b))
            return result, len(x), is_paired

        total, tokens, is_paired = torch.zeros(shape, device=device), 0, True
        with self._capture({name: linear}):
            mine = self._over_parts(moments)
            for first in range(0, self._num_parts, self._comm.size):
                own: tuple[Tensor, int, bool] = (torch.empty(0), 0, True)
                with self._comm.raise_on_all_ranks():
                    if first + self._comm.rank < self._num_parts:
                        _, own = next(mine)
                for count, pairs in self._comm.all_gather_object(own[1:]):
                    tokens, is_paired = tokens + count, is_paired and pairs
                for owner in range(min(self._comm.size, self._num_parts - first)):
                    is_own = owner == self._comm.rank
                    summand = own[0] if is_own else torch.empty_like(total)
                    self._comm.broadcast(summand, owner)
                    total += summand
        total /= max(tokens, 1)
        if not total.isfinite().all():
            raise UserError(
                f"{name}: its inputs overflow on the calibration text; use train.precision=bf16 or "
                "fp32, or quant.calibration=null."
            )
        return InputStatistics(total[0], total[1] if with_cross and is_paired else None)

    def _over_parts(self, call: Callable[[int], R]) -> Iterator[tuple[int, R]]:
        """Yield (part, result of `call`) for the parts of this rank, in their order."""
        results = iterate_in_order(call, self._mine, self._comm.device)
        yield from zip(self._mine, results, strict=True)

    @torch.no_grad()
    def _run(
        self, index: int, states: Mapping[int, Tensor], part: int, stop_at: str | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the hidden states after a decoder layer, and the captured inputs.

        With `stop_at`, the layer runs only as far as the linear of this name.
        """
        self._captured.inputs, self._captured.stop_at = {}, stop_at
        hidden, layer = states[part], self._layerwise.layers[index]
        with suppress(_StopForward):
            hidden = self._layerwise.run_layer(layer, hidden, self._calls[part][index])
        return hidden, self._captured.inputs

    @contextmanager
    def _capture(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let `_run` capture the inputs of `linears`, each on its own thread."""

        def capture(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._captured.inputs.setdefault(name, args[0])
            if name == self._captured.stop_at:
                raise _StopForward

        hooks = [m.register_forward_pre_hook(partial(capture, name)) for name, m in linears.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _StopForward(Exception):
    """The rest of the layer is not needed."""


def _as_rows(x: Tensor | None) -> Tensor | None:
    """Return an input of a linear as [tokens, in_features]; None if there is none."""
    return None if x is None else x.flatten(0, -2)


def _second_moment(a: Tensor, b: Tensor) -> Tensor:
    """Return a' b, summed in fp32, of inputs [tokens, in_features]."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b, out_dtype=torch.float32)  # their products are exact in fp32
    return a.float().t() @ b.float()
