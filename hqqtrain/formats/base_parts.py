"""The tensors of a PEFT adapter that are not LoRA matrices: whole modules, and rows of embeddings.

PEFT saves a module of `modules_to_save` under the names of the base, and the rows of
`trainable_token_indices` as `<module>.token_adapter.trainable_tokens_delta`. In spite of this name,
the rows replace those of the base.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from hqqtrain.common.errors import UserError

TOKENS_SUFFIX = ".token_adapter.trainable_tokens_delta"

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""


@dataclass(frozen=True)
class BaseParts:
    """The parts of its base that an adapter trains.

    Attributes:
        modules: Sorted names of the modules that it has in full.
        tokens: Module -> ids of the tokens whose rows it has.
    """

    modules: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add_to(self, config: LoraConfig) -> LoraConfig:
        """Write the parts into PEFT's configuration, and return it."""
        config.modules_to_save = self.modules or None
        config.trainable_token_indices = self.tokens or None
        return config


def read_base_parts(
    config: LoraConfig, parts: Shapes, tensors: Shapes | None, origin: str
) -> BaseParts:
    """Match the tensors of an adapter that are not LoRA matrices with its configuration.

    Args:
        config: The configuration that the file contains.
        parts: The tensors by the names of the base's modules, without PEFT's prefix.
        tensors: Shapes of the tensors of the model; None: it is for no particular model.
        origin: The beginning of messages.

    Raises:
        UserError: A tensor is not in the configuration, or does not fit the model, or is missing.
    """
    saved, rows = list(config.modules_to_save or ()), _token_keys(config)
    modules: dict[str, None] = {}
    tokens: dict[str, list[int]] = {}
    for name, shape in parts.items():
        if name.endswith(TOKENS_SUFFIX):
            module = name.removesuffix(TOKENS_SUFFIX)
            key = next((key for key in rows if module.endswith(key)), None)
            if key is None or len(shape) != 2 or shape[0] != len(rows[key]):
                raise UserError(
                    f"{origin}: {name} {list(shape)} does not have a row for each of the tokens in "
                    "trainable_token_indices; the two files belong to different adapters."
                )
            tokens[module] = rows[key]
            _check_rows(module, rows[key], shape, tensors, origin)
            continue
        module = name.rpartition(".")[0]
        if not any(module.endswith(key) for key in saved):
            raise UserError(
                f"{origin}: {name} {list(shape)} is a weight of the base, which modules_to_save "
                "does not name, and not one of a pair of LoRA matrices. Train the adapter without "
                "changing the base, or save it with save_embedding_layers=False."
            )
        if tensors is not None and tensors.get(name) != shape:
            raise UserError(
                f"{origin}: modules_to_save has {name} {list(shape)}, but the model has "
                f"{_shown(tensors.get(name))} there; the adapter belongs to another model, or the "
                "module is quantized (see quant.skip)."
            )
        modules[module] = None
    for key in saved:
        if not any(module.endswith(key) for module in modules):
            raise UserError(f"{origin}: modules_to_save has {key}, but no tensor of it is saved.")
    if rows and not tokens:
        raise UserError(f"{origin}: trainable_token_indices is set, but no row is saved.")
    return BaseParts(sorted(modules), tokens)


def _token_keys(config: LoraConfig) -> dict[str, list[int]]:
    """Return the end of a module's name -> ids; a list of ids is for the embeddings."""
    indices: Any = config.trainable_token_indices or {}
    return indices if isinstance(indices, dict) else {"": indices}


def _check_rows(
    module: str, ids: list[int], shape: tuple[int, ...], tensors: Shapes | None, origin: str
) -> None:
    if tensors is None:
        return
    weight = tensors.get(f"{module}.weight")
    if weight is None or weight[1:] != shape[1:]:
        raise UserError(
            f"{origin}: has rows {list(shape)} of {module}, but the model has {_shown(weight)} "
            "there; the adapter belongs to another model."
        )
    if max(ids) >= weight[0]:
        raise UserError(
            f"{origin}: has a row for token {max(ids)}, but {module} has only {weight[0]} rows. "
            "Add the same tokens with data.add_tokens, or name the run or the quantized/ that was "
            "saved with the adapter in model.name_or_path."
        )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
