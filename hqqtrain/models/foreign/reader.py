"""Read a checkpoint that another program has quantized as if it had our packed tensors."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from hqqtrain.common.errors import UserError
from hqqtrain.models.foreign.base import AGAIN, INSTEAD, SMALL_NUMEL, ForeignLayer, StoredTensors
from hqqtrain.models.weights.base import NameMatch
from hqqtrain.models.weights.resized import ResizedReader
from hqqtrain.models.weights.safetensors import TORCH_DTYPES, Entry, open_safetensors
from hqqtrain.nn.hqq_linear import PACKED_PARAMETERS
from hqqtrain_kernels.reference import pack

CHUNK_CODES = 1 << 24
"""Codes that are converted at a time, to bound memory."""

_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale", "output_scale")
"""Scales of a quantized cache of keys and values, which is computed in full precision instead."""

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class ForeignReader(ResizedReader):
    """The tensors of a foreign checkpoint: `W_q`, `scale` and `zero` of each quantized layer.

    Our packed tensors do not exist in the files. Their rows are converted when they are read. The
    other tensors are those of the files. `bytes_read` counts bytes of the files.

    Args:
        folder: The folder of the checkpoint.
        find_layers: Finds the quantized layers among the stored tensors.
        pin_memory: As in `SafetensorsReader`.

    Attributes:
        layers: The quantized layers, by module.
        notes: What is not taken over as it is, for the log.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        find_layers: Callable[[StoredTensors], Mapping[str, ForeignLayer]],
        *,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(folder, pin_memory=pin_memory)
        self._stored = self._entries
        self.layers: dict[str, ForeignLayer] = dict(find_layers(self))
        used = {name for layer in self.layers.values() for name in layer.tensors}
        dense = {name: entry for name, entry in self._stored.items() if name not in used}
        self._entries = dense | {
            f"{module}.{attribute}": self._packed_entry(layer, attribute)
            for module, layer in self.layers.items()
            for attribute in PACKED_PARAMETERS
        }
        self.use_names(NameMatch({name: name for name in self._entries}))

    @property
    def stored_names(self) -> Iterable[str]:
        return self._stored.keys()

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def stored_dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self._stored[name].dtype_name]

    def read_region(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        index = (rows or slice(None),) if columns is None else (rows or slice(None), columns)
        with open_safetensors(self._stored[name].path) as file:
            region = file.get_slice(name)[index]
        self.bytes_read += region.nbytes
        return region

    def read_small(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        tensors: dict[str, Tensor] = {}
        for name in names:
            shape = self._stored[name].shape
            if torch.Size(shape).numel() not in range(1, SMALL_NUMEL + 1):
                raise UserError(f"{self.folder}: {name} has the shape {list(shape)}; {AGAIN}")
            by_file[self._stored[name].path].append(name)
        for path, names_of_file in by_file.items():
            with open_safetensors(path) as file:
                tensors |= {name: file.get_tensor(name).clone() for name in names_of_file}
        return tensors

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Check like `SafetensorsReader.check`; an unused scale or part of a module is an error.

        Without it, the weights would be others. Only a bias of zeros may be unused, as old tools of
        GPTQ store it for layers that have none.
        """
        unused = super().check(expected)
        modules = {name.rpartition(".")[0] for name in expected}
        left = (name for name in unused if self._is_needed(name, modules))
        if name := next(left, None):
            raise UserError(
                f"{self.folder}: {name} is not known, and without it the weights may be wrong; "
                f"{INSTEAD}"
            )
        return unused

    def _is_needed(self, name: str, modules: Set[str]) -> bool:
        """Whether a tensor that is not used changes what the model computes."""
        module, _, attribute = name.rpartition(".")
        is_of_layer = module in modules or "scale" in attribute or "g_idx" in attribute
        if attribute in _CACHE_SCALES or not is_of_layer:
            return False
        counted = self.bytes_read
        is_zero_bias = attribute == "bias" and not self._read_dense(name, None).any()
        self.bytes_read = counted
        return not is_zero_bias

    def _read_stored(self, stored_name: str, rows: Sequence[slice] | None) -> Tensor:
        module, _, attribute = stored_name.rpartition(".")
        if module not in self.layers or attribute not in PACKED_PARAMETERS:
            return self._read_dense(stored_name, rows)
        layer = self.layers[module]
        rows = [slice(0, layer.layout.units)] if rows is None else rows
        try:
            parts = [self._read_packed(layer, attribute, units) for units in rows]
        except SafetensorError as error:
            raise UserError(f"{self.folder}: {module} cannot be read ({error}); {AGAIN}") from error
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.pin_memory() if self._pin_memory else tensor

    def _read_dense(self, stored_name: str, rows: Sequence[slice] | None) -> Tensor:
        """Return rows of a tensor that is not one of ours."""
        return super()._read_stored(stored_name, rows)

    def _read_packed(self, layer: ForeignLayer, attribute: str, units: slice) -> Tensor:
        """Return some units of one of our packed tensors."""
        if attribute == "W_q":
            return self._read_codes(layer, units)
        values = layer.scale(self, units) if attribute == "scale" else layer.zero(self, units)
        values = values.to(layer.spec.meta_dtype).contiguous()
        if not values.isfinite().all():
            raise UserError(
                f"{self.folder}: a {attribute} of {layer.name} is infinite or NaN; {AGAIN}"
            )
        return values

    def _read_codes(self, layer: ForeignLayer, units: slice) -> Tensor:
        layout = layer.layout
        packed = torch.empty(units.stop - units.start, layout.unit_bytes, dtype=torch.uint8)
        step = max(1, CHUNK_CODES // layout.unit_codes)
        for start in range(units.start, units.stop, step):
            chunk = slice(start, min(start + step, units.stop))
            codes = layer.codes(self, chunk)
            packed[chunk.start - units.start : chunk.stop - units.start] = pack(codes, layout.nbits)
        return packed

    def _packed_entry(self, layer: ForeignLayer, attribute: str) -> Entry:
        layout = layer.layout
        if attribute == "W_q":
            return Entry(self.folder, (layout.units, layout.unit_bytes), "U8")
        name = _DTYPE_NAMES[layer.spec.meta_dtype]
        return Entry(self.folder, (layout.units, layout.groups), name)
