"""The full-precision model with the weights of one decoder layer at a time.

Each weight is read once, by one rank, which sends it to the others. So a model can be evaluated
that no rank could hold.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from hqqtrain.distributed.comm import Communicator
from hqqtrain.loading.finite_check import DeferredFiniteCheck
from hqqtrain.loading.prefetch import Prefetcher
from hqqtrain.loading.rows import RowLoader, dense_row_ranges
from hqqtrain.models.build import restore_buffers
from hqqtrain.models.fqn import base_tensors, retie_weights
from hqqtrain.models.layerwise import LayerwiseModel
from hqqtrain.models.weights.base import WeightSource


class StreamedLayers:
    """A model on the meta device whose weights exist while they are needed.

    Args:
        model: The model, with the dtype that it computes in.
        reader: Reads its weights.
        comm: All ranks of the run.
        shared: Tensors by their names in the checkpoint that need not be read, because another
            model has them. All ranks have those of the same names.

    Attributes:
        model: The model. Its tensors outside of the decoder layers stay once they are loaded.
        layerwise: Runs the model layer by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: WeightSource,
        comm: Communicator,
        shared: Mapping[str, Tensor],
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layerwise = LayerwiseModel(self.model)
        self._reader, self._comm = reader, comm
        # By name in the checkpoint: the module of a tensor, and the name of its attribute.
        self._places: dict[str, tuple[nn.Module, str]] = {}
        # Tensors to read, on meta, by name: of the rest of the model, then of each decoder layer.
        self._parts: list[dict[str, Tensor]] = [{} for _ in range(len(self.layerwise.layers) + 1)]
        numbers = {name: number for number, name in enumerate(self.layerwise.names, 1)}
        prefix_length = self.layerwise.names[0].count(".") + 1
        for name, module, attribute, tensor in base_tensors(self.model):
            prefix = ".".join(name.split(".")[:prefix_length])
            self._places[name] = module, attribute
            if name not in shared:
                self._parts[numbers.get(prefix, 0)][name] = tensor.detach()
        self._set({name: shared[name] for name in self._places if name in shared})

    def load_outside(self) -> None:
        """Give the tensors outside of the decoder layers their values. Collective.

        Raises:
            UserError: A weight has NaN or Inf. Raised on every rank.
        """
        outside = self._parts[0]
        with self._row_loader([outside]) as loader:
            self._set(self._read(outside, loader))
        retie_weights(self.model)
        restore_buffers(self.model, self._comm.device)

    def load_layers(self) -> Iterator[int]:
        """Yield the index of each decoder layer while its tensors have values. Collective.

        Raises:
            UserError: As in `load_outside`.
        """
        _, *layers = self._parts
        with self._row_loader(layers) as loader:
            for index, layer in enumerate(layers):
                self._set(self._read(layer, loader))
                yield index
                self._set(layer)

    @contextmanager
    def _row_loader(self, parts: Iterable[Mapping[str, Tensor]]) -> Iterator[RowLoader]:
        """Read this rank's tensors of `parts` ahead, in their order."""
        ranges = chain.from_iterable(dense_row_ranges(self._mine(part)) for part in parts)
        with Prefetcher(self._reader, ranges, self._comm.device) as prefetcher:
            check = DeferredFiniteCheck(self._reader)
            yield RowLoader(prefetcher, check, self._comm.device, lambda *_: None)

    def _mine(self, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those tensors of a part that this rank reads: the ranks take turns."""
        comm = self._comm
        return {n: t for i, (n, t) in enumerate(part.items()) if i % comm.size == comm.rank}

    def _read(self, part: Mapping[str, Tensor], loader: RowLoader) -> dict[str, Tensor]:
        """Return the values of the tensors of a part. Collective."""
        device, mine = self._comm.device, self._mine(part)
        with self._comm.raise_on_all_ranks():
            values = {name: torch.empty_like(meta, device=device) for name, meta in part.items()}
            for name in mine:
                loader.load_dense(name, values[name])
            loader.finite_check.check()
        for number, value in enumerate(values.values()):
            self._comm.broadcast(value.view(-1).view(torch.uint8), number % self._comm.size)
        return values

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in their places in the model."""
        for name, tensor in tensors.items():
            module, attribute = self._places[name]
            is_parameter = isinstance(getattr(module, attribute), nn.Parameter)
            value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            setattr(module, attribute, value)
