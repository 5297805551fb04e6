"""The dense model that calibration runs, with the weights of one decoder layer at a time.

Its tensors come from the model that is loaded, whose shards are gathered, and from the rows of the
source that the ranks have just read.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import full_tensor, local_rows
from hqqtrain.loading.rows import has_rows, is_mine
from hqqtrain.models.build import restore_buffers
from hqqtrain.models.layerwise import LayerwiseModel
from hqqtrain.nn.hqq_linear import HQQLinear


class DenseLayers:
    """A dense model on the meta device whose tensors exist while they are needed.

    Args:
        model: The model on the meta device, with the dtype that it computes in.
        dense: The tensors that are not quantized, by name, of the model that is loaded.
        quantized: The quantized linears of that model, by name, in the same order on all ranks.
        comm: All ranks of the run.

    Attributes:
        layerwise: Runs the model layer by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: Mapping[str, Tensor],
        quantized: Mapping[str, HQQLinear],
        comm: Communicator,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._dense, self._quantized, self._comm = dense, quantized, comm
        self.layerwise = LayerwiseModel(self._model)
        self._readers = _readers(quantized, comm)

    def quantized_by_layer(self) -> list[dict[str, HQQLinear]]:
        """Return the quantized linears of each decoder layer, by name."""
        return [
            {n: linear for n, linear in self._quantized.items() if n.startswith(f"{prefix}.")}
            for prefix in self.layerwise.names
        ]

    def quantized(self) -> dict[str, HQQLinear]:
        """Return the quantized linears of all decoder layers, in their order, by name."""
        return {n: linear for layer in self.quantized_by_layer() for n, linear in layer.items()}

    def linear(self, name: str) -> nn.Linear:
        """Return the dense linear `name`."""
        linear = self._model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    def fill_outside(self) -> None:
        """Give the tensors outside of the decoder layers their values. Collective."""
        self._fill(self._outside())
        restore_buffers(self._model, self._comm.device)

    def release_outside(self) -> None:
        """Drop the parameters outside of the decoder layers."""
        for module in self._outside().values():
            _release(module)

    def fill_layer(self, index: int) -> None:
        """Give the tensors of a decoder layer that are not quantized their values. Collective."""
        layer, prefix = self.layerwise.layers[index], self.layerwise.names[index]
        self._fill({f"{prefix}.{path}".rstrip("."): m for path, m in layer.named_modules()})

    def release_layer(self, index: int) -> None:
        """Drop the parameters of a decoder layer."""
        for module in self.layerwise.layers[index].modules():
            _release(module)

    def gather_weight(self, name: str, rows: Tensor | None) -> None:
        """Give linear `name` the weight whose rows the ranks have. Collective.

        Args:
            name: The name of the linear.
            rows: The rows that this rank has, in the order of `Layout.rows_of`; None: it has none.
        """
        linear, layout = self.linear(name), self._quantized[name].layout
        full = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=self._comm.device)
        for rank, units in self._readers[name]:
            parts = layout.rows_of(units.start, units.stop)
            sizes = [part.stop - part.start for part in parts]
            if rank == self._comm.rank:
                assert rows is not None
                sent = rows.to(full.dtype).contiguous()
            else:
                sent = full.new_empty(sum(sizes), layout.in_features)
            self._comm.broadcast(sent.view(torch.uint8), rank)
            for part, values in zip(parts, sent.split(sizes), strict=True):
                full[part] = values
        linear.weight = nn.Parameter(full, requires_grad=False)

    def _outside(self) -> dict[str, nn.Module]:
        """Return the modules outside of the decoder layers, by name."""
        prefixes = tuple(f"{name}." for name in self.layerwise.names)
        return {
            name: module
            for name, module in self._model.named_modules()
            if not f"{name}.".startswith(prefixes)
        }

    def _fill(self, modules: Mapping[str, nn.Module]) -> None:
        """Copy the tensors that the loaded model has for `modules`. Collective."""
        for path, module in modules.items():
            for name, tensor in _own_tensors(module):
                value = self._dense.get(f"{path}.{name}" if path else name)
                if value is None:  # quantized, tied, or computed by the constructor
                    continue
                full = full_tensor(value).to(self._comm.device, tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(full, False) if is_parameter else full)


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Return the parameters and buffers of `module` itself, by name."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _release(module: nn.Module) -> None:
    """Move the parameters of `module` itself to the meta device."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _readers(
    quantized: Mapping[str, HQQLinear], comm: Communicator
) -> dict[str, list[tuple[int, slice]]]:
    """Return by name which rank reads which units of a weight. Collective."""
    mine: dict[str, tuple[int, int]] = {}
    for number, (name, layer) in enumerate(quantized.items()):
        if is_mine(layer.W_q, number, comm) and has_rows(layer.W_q):
            units = local_rows(layer.W_q)
            mine[name] = (units.start, units.stop)
    of_ranks = list(enumerate(comm.all_gather_object(mine)))
    return {
        name: [(rank, slice(*units[name])) for rank, units in of_ranks if name in units]
        for name in quantized
    }
