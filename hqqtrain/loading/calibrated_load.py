"""Quantize the linears of the decoder layers with the inputs that they get from real text.

One decoder layer at a time is in memory with its full weights. Each rank reads its rows and sends
them to the others, all ranks collect statistics of the inputs, and each rank quantizes its rows. A
linear is quantized after those that its input depends on, so its statistics contain their errors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import local_rows
from hqqtrain.loading.dense_layers import DenseLayers
from hqqtrain.loading.layer_inputs import MAX_PARTS, LayerInputs
from hqqtrain.loading.rows import RowLoader, layer_squared_error, source_rows
from hqqtrain.models.families.structure import find_decoder_layers, text_config
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.calibrated.quantize import quantize_rows
from hqqtrain.quant.calibrated.statistics import ColumnPlan, InputStatistics, plan_columns
from hqqtrain.quant.quantize import QuantizedWeight, dequantize_weight, quantize_async
from hqqtrain.quant.solvers.registry import SOLVERS


@dataclass(frozen=True)
class Calibration:
    """The text that solvers calibrate with, and a model to run it through.

    Attributes:
        sequences: int64 [sequences, tokens].
        model: The dense model on the meta device, with the dtype that the run computes in.
        digest: `sha256:...` of the sequences.
        source: The name of the data that the text is from.
    """

    sequences: Tensor
    model: nn.Module
    digest: str
    source: str = ""


@dataclass(frozen=True)
class CalibratedLoader:
    """Quantizes the linears of one decoder layer after the other.

    Attributes:
        sequences: The calibration text, int64 [sequences, tokens].
        dense: The dense model that it runs through.
        rows: Stores what is quantized. Its prefetcher reads those rows of the linears in decoder
            layers that this rank owns, in the order of `DenseLayers.quantized_by_layer`.
        mine: The names of the linears that this rank owns rows of.
        comm: All ranks of the run.
        on_layer: Called with the name of each linear when it is quantized.
    """

    sequences: Tensor
    dense: DenseLayers
    rows: RowLoader
    mine: set[str]
    comm: Communicator
    on_layer: Callable[[str], object]

    def load(self) -> None:
        """Read and quantize all calibrated linears. Collective.

        Raises:
            UserError: A weight or an input has NaN or Inf, or a weight is near the largest float.
                Raised on every rank.
        """
        self.dense.fill_outside()
        inputs = LayerInputs(self.dense.layerwise, self.sequences, self.comm)
        self.dense.release_outside()
        for index, linears in enumerate(self.dense.quantized_by_layer()):
            weights = self._read(linears)
            self.dense.fill_layer(index)
            for name in linears:
                self.dense.gather_weight(name, weights.get(name))
            groups = inputs.run_full(index, {name: self.dense.linear(name) for name in linears})
            for names, statistics in self._statistics(index, linears, groups, inputs):
                group = {name: linears[name] for name in names}
                rows = self._quantize(group, weights, statistics)
                for name in group:
                    self.dense.gather_weight(name, rows.get(name))
            inputs.run_quantized(index)
            self.dense.release_layer(index)

    def _read(self, linears: Mapping[str, HQQLinear]) -> dict[str, Tensor]:
        """Return this rank's rows of the weights of a decoder layer, by name. Collective."""
        weights = {}
        with self.comm.raise_on_all_ranks():
            for name in linears:
                if name in self.mine:
                    weights[name] = next(self.rows.prefetcher)
                    not_finite = ~weights[name].isfinite().all()
                    self.rows.finite_check.add(source_rows(name, linears[name]), not_finite)
            self.rows.finite_check.check()
        return weights

    def _statistics(
        self,
        index: int,
        linears: Mapping[str, HQQLinear],
        groups: list[list[str]],
        inputs: LayerInputs,
    ) -> Iterator[tuple[list[str], InputStatistics | None]]:
        """Yield linears with a common input, in the order of their calls, and its statistics.

        There are none if no solver of these linears calibrates. A linear that the text does not
        reach, such as that of an expert, comes last and has none either. Collective.
        """
        for names in groups:
            solvers = [SOLVERS[linears[name].spec.solver] for name in names]
            statistics = None
            if any(solver.calibrates for solver in solvers):
                corrects = any(solver.has_feedback for solver in solvers)
                statistics = inputs.statistics(
                    index, names, self.dense.linear(names[0]), with_cross=corrects
                )
            yield names, statistics
        called = {name for names in groups for name in names}
        yield from (([name], None) for name in linears if name not in called)

    def _quantize(
        self,
        group: Mapping[str, HQQLinear],
        weights: dict[str, Tensor],
        statistics: InputStatistics | None,
    ) -> dict[str, Tensor]:
        """Quantize this rank's rows of linears with a common input. Collective.

        Args:
            group: The linears, by name.
            weights: Rows of their weights, by name, which are removed.
            statistics: The statistics of their input, if they are known.

        Returns:
            The dequantized rows, by name.
        """
        plans = _ColumnPlans(statistics)
        dequantized = {}
        with self.comm.raise_on_all_ranks():
            for name, layer in group.items():
                error = self.rows.squared_errors[name] = torch.zeros(
                    2, dtype=torch.float64, device=self.comm.device
                )
                self.on_layer(name)  # it may raise, so it is called where all ranks hear of that
                weight = weights.pop(name, None)
                if weight is None:
                    continue
                spec, layout, first_unit = layer.spec, layer.layout, local_rows(layer.W_q).start
                if plan := plans.plan_for(layer):
                    packed = quantize_rows(weight, layout, first_unit, spec, plan)
                    _check_finite(name, packed)
                else:
                    packed, _ = quantize_async(weight, spec, name=name)
                self.rows.store(name, layer, packed.W_q, packed.scale, packed.zero)
                error += layer_squared_error(weight, packed, layer)
                dequantized[name] = dequantize_weight(
                    packed, layout.slice(0, len(packed.scale)), self.dense.linear(name).weight.dtype
                )
        return dequantized


def _check_finite(name: str, packed: QuantizedWeight) -> None:
    """Check that the errors that were passed on between columns have not overflowed fp32."""
    if not (packed.scale.isfinite().all() and packed.zero.isfinite().all()):
        raise UserError(
            f"{name}.weight: is so large that it overflows with quant.calibration; use "
            "quant.calibration=null, or check the checkpoint, whose weights are damaged if they "
            "are near the largest float."
        )


class _ColumnPlans:
    """The plans for linears with a common input, one for each kind of groups."""

    def __init__(self, statistics: InputStatistics | None) -> None:
        self._statistics = statistics
        self._known: dict[tuple[int, int, bool], ColumnPlan] = {}

    def plan_for(self, layer: HQQLinear) -> ColumnPlan | None:
        """Return the plan for a layer; None if it is quantized without calibration."""
        solver = SOLVERS[layer.spec.solver]
        if self._statistics is None or not solver.calibrates:
            return None
        group_size, axis = layer.layout.group_size, layer.layout.axis
        key = (group_size, axis, solver.has_feedback)
        if key not in self._known:
            self._known[key] = plan_columns(
                self._statistics, group_size, axis, has_feedback=solver.has_feedback
            )
        return self._known[key]


def calibration_bytes(model: nn.Module, tokens: int, dtype: torch.dtype, *, world_size: int) -> int:
    """Return the bytes on a device that calibrating the largest decoder layer needs.

    Either the layer runs, with the text in two models and the inputs of all linears in one of them.
    Or the plan for the widest input is made, which takes two sums, the correction and one summand
    in fp32, and up to two matrices in fp64.

    Args:
        model: The model on the meta device, with HQQLinears in place.
        tokens: Calibration tokens of all ranks.
        dtype: The dtype that the run computes in.
        world_size: Number of ranks.
    """
    largest, tokens = 0, -(-tokens // min(world_size, MAX_PARTS))
    for layer in (find_decoder_layers(model) or ()) if tokens else ():
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, HQQLinear)}
        widths = {(name.rpartition(".")[0], m.in_features) for name, m in linears.items()}
        weights = sum(m.in_features * m.out_features for m in linears.values())
        hidden, widest = text_config(model).hidden_size, max((w for _, w in widths), default=0)
        running = tokens * (3 * hidden + sum(width for _, width in widths))
        planning = tokens * (2 * hidden + widest)
        layer_bytes = max(dtype.itemsize * running, dtype.itemsize * planning + 32 * widest**2)
        largest = max(largest, dtype.itemsize * weights + layer_bytes)
    return largest
