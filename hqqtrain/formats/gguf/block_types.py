"""The block types of GGUF that keep our codes, and the choice of one for each layer.

Each type stores blocks of neighboring weights of a row. A block of Q4_1 has 32 weights with one
scale and one minimum. Q4_K and Q2_K have super-blocks of 256 weights, whose sub-blocks have small
integers instead, which are multiples of two numbers of the super-block. Q8_0 has no minimum, so 8
bits are quantized again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings
from hqqtrain.models.foreign import gguf_types


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF for quantized weights.

    Attributes:
        name: Its name in GGUF.
        nbits: The bits of a code.
        keeps_codes: Whether the codes are ours.
    """

    name: str
    nbits: int
    keeps_codes: bool = True

    @property
    def block_size(self) -> int:
        """The number of weights in a block or super-block. Rows are multiples of it."""
        return gguf_types.BLOCK_TYPES[self.name].block_size

    @property
    def group_size(self) -> int:
        """The number of weights that share a scale. Our groups are multiples of it."""
        return gguf_types.BLOCK_TYPES[self.name].group_size

    @property
    def block_bytes(self) -> int:
        """The bytes of a block."""
        return gguf_types.BLOCK_TYPES[self.name].block_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, with scales and minima."""
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, in_features: int) -> int:
        """Return the bytes of a row of the weight."""
        return in_features // self.block_size * self.block_bytes

    def misfits(self, module: ModuleSettings) -> Iterator[str]:
        """Yield why the type cannot hold a layer, as the end of a sentence about the layer."""
        if module.in_features % self.block_size:
            yield f"has rows of {module.in_features} weights, no multiple of {self.block_size}"
        if not self.keeps_codes:
            return
        if module.nbits > self.nbits:
            yield f"has {module.nbits} bits"
        if module.axis != 1:
            yield "has groups along its columns (quant.axis=0)"
        elif module.layout.group_size % self.group_size:
            yield f"has groups of {module.layout.group_size}, no multiple of {self.group_size}"


Q4_1 = BlockType("Q4_1", 4)
Q4_K = BlockType("Q4_K", 4)
Q2_K = BlockType("Q2_K", 2)
Q8_0 = BlockType("Q8_0", 8, keeps_codes=False)

BLOCK_TYPES = {kind.name: kind for kind in (Q4_1, Q4_K, Q2_K, Q8_0)}
"""The types, by the values of `export.gguf_type`."""

_PREFERENCES = {8: (Q8_0,), 4: (Q4_K, Q4_1), 3: (Q4_K, Q4_1), 2: (Q2_K, Q4_1), 1: (Q2_K, Q4_1)}
"""Bits of a layer -> the types of `auto`: the first that fits is chosen."""


def choose_block_type(module: ModuleSettings, asked: str) -> BlockType | None:
    """Return the type for a layer; None: no type fits.

    Args:
        module: The settings of the layer.
        asked: The value of `export.gguf_type`.
    """
    kinds = _PREFERENCES[module.nbits] if asked == "auto" else (BLOCK_TYPES[asked],)
    return next((kind for kind in kinds if not any(kind.misfits(module))), None)


def block_type_refusals(settings: QuantizedSettings, asked: str) -> Iterator[str]:
    """Yield why `asked`, a value of `export.gguf_type`, cannot hold a model."""
    for name, module in settings.modules.items():
        if choose_block_type(module, asked) is None:
            kind = _PREFERENCES[module.nbits][-1] if asked == "auto" else BLOCK_TYPES[asked]
            fits = kind is not Q8_0 and not any(Q8_0.misfits(module))
            advice = " (export.gguf_type=Q8_0 can, with 8.5 bits per weight)" if fits else ""
            yield f"{name} {next(kind.misfits(module))}, which {kind.name} cannot hold{advice}"
            return
