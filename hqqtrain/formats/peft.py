"""Read and write adapters as stock PEFT files that record the base they were trained on."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_directory, atomic_write, atomic_write_json
from hqqtrain.common.reading import parse_json
from hqqtrain.formats.adapter_base import BaseModelRef, check_fingerprint, recorded_fingerprint
from hqqtrain.formats.adapter_card import AdapterCard, render_card
from hqqtrain.formats.adapter_config import (
    CONFIG,
    WEIGHTS,
    LoraShape,
    read_adapter_config,
    resolve_patterns,
)
from hqqtrain.formats.base_parts import TOKENS_SUFFIX, read_base_parts
from hqqtrain.formats.companions import (
    GENERATION_CONFIG,
    companion_files,
    copy_companion_files,
)
from hqqtrain.formats.writer import save_tensors

_FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of LoRA matrices, as safetensors names them."""

_SCALING_KEY = "hqqtrain_scaling"
"""Key of the metadata of adapter_model.safetensors."""

_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""Keys of adapter_config.json that decide how much an adapter adds to its base."""

_PREFIX = "base_model.model."
"""First parts of PEFT's names, before those of the base model."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter with the fingerprint of its base.

    Attributes:
        config: PEFT's configuration. Its patterns are full names of modules.
        state: The tensors by PEFT's names: `base_model.model.<module>.lora_A.weight` [r, in] and
            `.lora_B.weight` [out, r], and those of `base_parts.py`.
        fingerprint: The fingerprint of the base that the adapter was trained on. None if the file
            does not record it, as in adapters of other tools.
    """

    config: LoraConfig
    state: dict[str, torch.Tensor]
    fingerprint: str | None = None

    @property
    def modules(self) -> list[str]:
        """Sorted names of the adapted linear layers, as in the base's checkpoint."""
        suffix = ".lora_A.weight"
        names = (name.removesuffix(suffix) for name in self.state if name.endswith(suffix))
        return sorted(name.removeprefix(_PREFIX) for name in names)

    def scaling(self, module: str) -> float:
        """Return PEFT's factor of B A for a module: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        config = self.config
        r = (config.rank_pattern or {}).get(module, config.r)
        alpha = (config.alpha_pattern or {}).get(module, config.lora_alpha)
        return alpha / (math.sqrt(r) if config.use_rslora else r)

    def delta(self, module: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return what merging adds to a weight: scaling * B A, fp32 [out_features, in_features]."""
        A, B = (self.matrix(module, name).to(device) for name in "AB")
        return self.scaling(module) * (B @ A)

    def matrix(self, module: str, name: str) -> torch.Tensor:
        """Return A [r, in_features] or B [out_features, r] of a module, fp32; `name` is A or B."""
        return self.state[self.matrix_name(module, name)].float()

    def matrix_name(self, module: str, name: str) -> str:
        """Return PEFT's name of the matrix A or B of a module."""
        return f"{_PREFIX}{module}.lora_{name}.weight"

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Module -> ids of the tokens whose rows of it the adapter has trained."""
        tokens: Any = self.config.trainable_token_indices
        return tokens or {}

    def token_rows(self, module: str) -> torch.Tensor:
        """Return the trained rows of a module in `tokens`, in the order of their ids."""
        return self.state[f"{_PREFIX}{module}{TOKENS_SUFFIX}"]

    @property
    def base_tensors(self) -> list[str]:
        """Names of the tensors of the base that the adapter replaces, as a whole or in part."""
        names = (name.removeprefix(_PREFIX) for name in self.state if ".lora_" not in name)
        full = [name for name in names if not name.endswith(TOKENS_SUFFIX)]
        return [*full, *(f"{module}.weight" for module in self.tokens)]

    def replaced(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base as the adapter has trained it; itself if it has not."""
        if (full := self.state.get(f"{_PREFIX}{name}")) is not None:
            return full.to(tensor.device)
        module = name.removesuffix(".weight")
        if module not in self.tokens or name == module:
            return tensor
        rows = self.token_rows(module).to(tensor.device).float()
        return tensor.float().index_copy(0, torch.tensor(self.tokens[module]).to(rows.device), rows)

    def check_base(self, fingerprint: str, origin: str) -> None:
        """Check that the adapter was trained on the base with this fingerprint.

        An adapter that does not record its base is accepted.

        Args:
            fingerprint: The fingerprint of the base to use.
            origin: Where the adapter comes from, for the message.

        Raises:
            UserError: The adapter was trained on another base.
        """
        advice = (
            "Use the quantized/ that was saved with it, or the same model.name_or_path and "
            "quant.nbits=null if it has none; or train a new adapter."
        )
        check_fingerprint(self.fingerprint, fingerprint, origin, advice)


def save_adapter(state: Mapping[str, torch.Tensor], config: LoraConfig, folder: Path, *,
                 base: BaseModelRef, card: AdapterCard, tokenizer: Path | None = None,
                 generation_config: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Write a stock PEFT adapter with a README.md, completely or not at all.

    Args:
        state: The full tensors by PEFT's names, as `peft.get_peft_model_state_dict` returns them.
        config: PEFT's configuration.
        folder: The folder to create or replace.
        base: The base that the adapter was trained on.
        card: The content of README.md.
        tokenizer: The folder of a tokenizer to save with the adapter.
        generation_config: The generation settings, if they are not those of the base.
    """
    with atomic_directory(folder) as partial:
        write_adapter(partial, state, config, base)
        atomic_write(partial / "README.md", render_card(card))
        if tokenizer:
            files = companion_files(tokenizer)
            files.pop(GENERATION_CONFIG, None)
            copy_companion_files(files, partial)
        if generation_config:
            atomic_write_json(partial / GENERATION_CONFIG, generation_config)


def write_adapter(
    folder: Path, state: Mapping[str, torch.Tensor], config: LoraConfig, base: BaseModelRef
) -> None:
    """Write the two files of a stock PEFT adapter into the existing `folder`."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    scaling = json.dumps({key: getattr(config, key) for key in _SCALING}, sort_keys=True)
    save_tensors(tensors, folder / WEIGHTS, **base.metadata(), **{_SCALING_KEY: scaling})
    # PEFT holds some lists as sets: sort them, so that equal adapters are equal files.
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    values |= {"base_model_name_or_path": base.name, "revision": base.revision}
    values["inference_mode"] = True  # as PEFT saves it
    atomic_write_json(folder / CONFIG, values)


def load_adapter(
    folder: Path, *, origin: str = "", linears: Mapping[str, tuple[int, int]] | None = None,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
) -> Adapter:  # fmt: skip
    """Read a PEFT LoRA adapter from a folder.

    Args:
        folder: The folder.
        origin: The beginning of messages; by default the folder.
        linears: (out_features, in_features) of every linear layer of the model that may have an
            adapter, by its name. The adapter must fit, which is checked before its tensors are
            read. By default the adapter is read for no model in particular.
        tensors: The shapes of all tensors of the model, for what the adapter trains of its base.

    Raises:
        UserError: A file is missing or damaged, the adapter does not fit the model, or it is more
            than hqqtrain can merge.
    """
    folder, origin = Path(folder), origin or str(folder)
    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(folder / name):  # also for names that no path can have
            raise UserError(f"{origin}: contains no {name}; {_missing_file_advice(folder, name)}")
    config = read_adapter_config(folder / CONFIG, origin)
    resolved: list[LoraConfig] = []

    def check(shapes: Mapping[str, tuple[int, ...]]) -> None:
        matrices = {name: shape for name, shape in shapes.items() if ".lora_" in name}
        others = {k.removeprefix(_PREFIX): v for k, v in shapes.items() if k not in matrices}
        parts = read_base_parts(config, others, tensors, origin)
        plain = resolve_patterns(config, _check_pairs(matrices, origin), linears, origin)
        resolved.append(parts.add_to(plain))

    state, metadata = _read_state(folder / WEIGHTS, check, origin)
    _check_scaling(config, metadata.get(_SCALING_KEY), origin)
    return Adapter(resolved[0], state, recorded_fingerprint(metadata))


def _check_scaling(config: LoraConfig, recorded: str | None, origin: str) -> None:
    """Refuse a scaling that is not the one with which the matrices were trained.

    PEFT would compute something else without a word. An adapter of another tool, or of the first
    release, does not record its scaling.
    """
    try:
        values = parse_json(recorded or "{}")
    except ValueError:
        values = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        now = getattr(config, key) if key in _SCALING else value
        if (now or None) != (value or None):
            raise UserError(
                f"{origin}: {CONFIG} has {key}={json.dumps(now)}, but the adapter was trained with "
                f"{json.dumps(value)}, as {WEIGHTS} records. Restore {CONFIG}, or train a new "
                "adapter with the other value."
            )


def _missing_file_advice(folder: Path, name: str) -> str:
    if os.path.isfile(folder / "adapter" / CONFIG):
        return f"give the folder of the adapter, {folder / 'adapter'}."
    if name == WEIGHTS and os.path.exists(folder / "adapter_model.bin"):
        return (
            "adapter_model.bin is a pickle, which hqqtrain never reads. Load it with PEFT and save "
            "it again with save_pretrained."
        )
    return "give the folder of a PEFT adapter."


def _read_state(
    path: Path, check: Callable[[Mapping[str, tuple[int, ...]]], object], origin: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file. `check` gets the shapes before it is read."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, view in slices.items():
                if view.get_dtype() not in _FLOATS:
                    raise UserError(
                        f"{origin}: {name} has the dtype {view.get_dtype()}; LoRA matrices have "
                        f"{', '.join(_FLOATS)}."
                    )
            check({name: tuple(view.get_shape()) for name, view in slices.items()})
            state = {name: file.get_tensor(name).clone() for name in slices}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{origin}: {WEIGHTS}: not a complete safetensors file ({error})."
        ) from error
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{origin}: {name} contains NaN or infinity; use another checkpoint.")
    return state, metadata


def _check_pairs(matrices: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, LoraShape]:
    """Return the adapted modules; all matrices [rows, columns] must be pairs of A and B."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in matrices.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None or len(shape) != 2:
            raise UserError(
                f"{origin}: {WEIGHTS}: {name} {list(shape)} is not one of a pair of LoRA matrices."
            )
        pairs.setdefault(match[1], {})[match[2]] = shape
    for module, pair in pairs.items():
        if len(pair) < 2 or pair["A"][0] != pair["B"][1]:
            raise UserError(
                f"{origin}: {WEIGHTS}: {module} has {pair}, and not a pair of LoRA matrices "
                "A [r, in_features] and B [out_features, r]."
            )
    if not pairs:
        raise UserError(f"{origin}: {WEIGHTS}: contains no tensors.")
    return {
        name: LoraShape(pair["A"][0], pair["A"][1], pair["B"][0]) for name, pair in pairs.items()
    }
