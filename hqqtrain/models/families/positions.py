"""Positions of tokens: the longest sequence that a model has positions for, and its first position.

Most models compute their positions, to any length. Others have a table with one row for each
position, and an index outside of it ends a GPU process with an assertion.
"""

import re
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from hqqtrain.models.families.structure import text_backbone
from hqqtrain.models.fqn import base_model, strip_wrappers

_TABLE_NAME = re.compile(
    r"^(wpe|positions_embed|embed_positions|position_embeddings|pos_encoding)$"
)
"""Names that transformers gives to tables of positions."""

_first_positions: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def first_position(model: nn.Module) -> int:
    """Return the position of the first token of a text, which the caller must add to positions.

    It is 0, except for RoBERTa and its relatives. Their positions follow the index of the padding
    token, and they do not add it to positions that they are given.
    """
    root = base_model(model)
    if root not in _first_positions:
        tables = (
            getattr(module, "position_embeddings", None)
            for module in root.modules()
            if hasattr(module, "create_position_ids_from_input_ids")
        )
        table = next((table for table in tables if isinstance(table, nn.Embedding)), None)
        padding = None if table is None else table.padding_idx
        _first_positions[root] = 0 if padding is None else padding + 1
    return _first_positions[root]


def shortest_position_table(model: nn.Module) -> tuple[str, int] | None:
    """Return name and length of the shortest table of positions; None if the model has none.

    The length is the number of tokens that have a position.
    """
    first = first_position(model)
    lengths = {name: rows - first for name, rows in _position_tables(text_backbone(model))}
    return min(lengths.items(), key=lambda item: item[1], default=None)


def _position_tables(backbone: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield name and number of rows of every table of positions."""
    for name, module in backbone.named_modules():
        tables = dict(module.named_buffers(recurse=False))
        tables |= {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        for key, table in tables.items():
            if _TABLE_NAME.match(key) and table.dim() == 2:
                yield strip_wrappers(f"{name}.{key}"), table.shape[0]
        if isinstance(module, nn.Embedding) and _TABLE_NAME.match(name.rpartition(".")[2]):
            # Some tables have rows in front that no token uses.
            offset = getattr(module, "offset", 0)
            assert isinstance(offset, int)
            yield strip_wrappers(name), module.num_embeddings - offset
