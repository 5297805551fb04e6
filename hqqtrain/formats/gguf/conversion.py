"""How the tensors of a model of Hugging Face become those of a GGUF file."""

import re
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.companions import GENERATION_CONFIG
from hqqtrain.formats.gguf.families import FAMILIES, head_dim
from hqqtrain.formats.gguf.metadata import write_architecture
from hqqtrain.formats.gguf.package import import_gguf
from hqqtrain.formats.gguf.rope import rope_tensors
from hqqtrain.formats.gguf.tokenizer import write_tokenizer
from hqqtrain.formats.gguf.writer import DENSE_TYPES, TensorEntry, dense_type
from hqqtrain.models.build import build_meta
from hqqtrain.models.fqn import expected_shapes


class Conversion(Protocol):
    """The names, the order of rows, the dense tensors and the metadata of a GGUF file.

    Attributes:
        architecture: llama.cpp's name of the architecture.
    """

    architecture: str

    def name(self, name: str) -> str:
        """Return the name in GGUF of a tensor of the checkpoint."""

    def order(self, name: str) -> Tensor | None:
        """Return the rows of a tensor of the checkpoint in the order of GGUF; None: the same."""

    def entries(self) -> dict[str, TensorEntry]:
        """Return the dense tensors of the file, by their names in GGUF."""

    def dense(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a dense tensor of the checkpoint as the file has it; None: it is in `extra`."""

    def extra(self) -> Iterable[tuple[str, Tensor]]:
        """Return the dense tensors that are not in the checkpoint, with their names in GGUF."""

    def write_metadata(self, writer: Any) -> None:
        """Add the metadata, but for `general.*`, to a `GGUFWriter`."""

    def finish(self) -> None:
        """Remove temporary files, once all tensors are written."""


class FamilyConversion:
    """The conversion of a model of `FAMILIES`."""

    def __init__(self, export: ModelExport, dtype: torch.dtype) -> None:
        """Prepare to convert the model of `export`, its dense matrices to `dtype`."""
        self._export, self._config, self._dtype = export, export.hf_config, dtype
        self._family = FAMILIES[self._config.model_type]
        self.architecture = self._family.architecture
        gguf = import_gguf()
        arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        self._names = gguf.get_tensor_name_map(arch, self._config.num_hidden_layers)

    def name(self, name: str) -> str:
        """Return the name in GGUF of a tensor of the checkpoint."""
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, f"GGUF has no name for {name}"
        return found

    def order(self, name: str) -> Tensor | None:
        """Return the order of the rows of q and k, where the family permutes them.

        Hugging Face rotates the first half of a head against the second, and the original Llama
        each value against its neighbor.
        """
        match = re.search(r"self_attn\.([qk])_proj\.", name)
        if not (match and self._family.permutes_heads):
            return None
        heads = self._config.num_attention_heads
        if match[1] == "k":
            heads = self._config.num_key_value_heads or heads
        halves = torch.arange(heads * head_dim(self._config)).view(heads, 2, -1)
        return halves.transpose(1, 2).flatten()

    def entries(self) -> dict[str, TensorEntry]:
        """Return the dense tensors of the file, by their names in GGUF."""
        quantized = {f"{name}.weight" for name in self._export.settings.modules}
        shapes = {
            self.name(name): shape
            for name, shape in expected_shapes(build_meta(self._config)).items()
            if name not in quantized
        }
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.extra()}
        return {
            name: TensorEntry(DENSE_TYPES[dense_type(shape, self._dtype)], shape)
            for name, shape in shapes.items()
        }

    def dense(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return a dense tensor in the order of GGUF, with the offset that llama.cpp's norms have.

        The weights of Gemma's norms are stored without the one that is added to them.
        """
        if name.endswith("norm.weight") and self._family.norm_offset:
            return tensor.float() + self._family.norm_offset
        order = self.order(name)
        return tensor if order is None else tensor[order.to(tensor.device)]

    def extra(self) -> Iterable[tuple[str, Tensor]]:
        """Return the factors of the rotary embedding's frequencies, if it is scaled."""
        return rope_tensors(self._config, head_dim(self._config)).items()

    def write_metadata(self, writer: Any) -> None:
        """Add the architecture and the tokenizer."""
        write_architecture(writer, self._config)
        tokenizer, adapter = self._export.tokenizer, self._export.settings_folder
        trained = adapter is not None and (adapter / GENERATION_CONFIG).is_file()
        settings = adapter if adapter and trained else tokenizer
        write_tokenizer(writer, tokenizer, self._config.vocab_size, settings)

    def finish(self) -> None:
        """Do nothing: there are no temporary files."""
