"""Read and write adapters as stock PEFT files that record the base they were trained on.

An adapter corrects the errors of one quantized base; on any other base it adds noise. PEFT warns
about unknown keys in adapter_config.json. The fingerprint of the base is therefore stored in the
metadata of adapter_model.safetensors, which stock tools ignore.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_directory, atomic_write, atomic_write_json
from hqqtrain.formats.adapter_card import AdapterCard, render_card
from hqqtrain.formats.writer import save_tensors

WEIGHTS = "adapter_model.safetensors"

CONFIG = "adapter_config.json"

_FINGERPRINT_KEY = "hqqtrain_base_fingerprint"
"""Key of the metadata of adapter_model.safetensors."""

_PREFIX = "base_model.model."
"""First parts of PEFT's names, before those of the base model."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter with the fingerprint of its base.

    Attributes:
        config: PEFT's configuration.
        state: The tensors by PEFT's names: `base_model.model.<module>.lora_A.weight` [r, in] and
            `.lora_B.weight` [out, r].
        fingerprint: The fingerprint of the quantized base that the adapter was trained on. None
            if the file does not record it, as in adapters of other tools.
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
        # Patterns of module names that have another rank or alpha, as PEFT looks them up.
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), module), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        return alpha / (math.sqrt(r) if config.use_rslora else r)

    def delta(self, module: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return what merging adds to a weight: scaling * B A, fp32 [out_features, in_features]."""
        A, B = (self.state[f"{_PREFIX}{module}.lora_{x}.weight"].to(device).float() for x in "AB")
        return self.scaling(module) * (B @ A)

    def check_base(self, fingerprint: str, origin: str) -> None:
        """Check that the adapter was trained on the base with this fingerprint.

        An adapter that does not record its base is accepted.

        Args:
            fingerprint: The fingerprint of the base to use.
            origin: Where the adapter comes from, for the message.

        Raises:
            UserError: The adapter was trained on another base.
        """
        if self.fingerprint not in (None, fingerprint):
            raise UserError(
                f"{origin}: trained on the quantized base {self.fingerprint}, but this base is "
                f"{fingerprint}. Use the quantized/ that was saved with it, or train a new adapter."
            )


@dataclass(frozen=True)
class BaseModelRef:
    """The base of an adapter, by the model's name and revision and its own fingerprint."""

    name: str
    revision: str | None
    fingerprint: str


def save_adapter(state: Mapping[str, torch.Tensor], config: LoraConfig, folder: Path, *,
                 card: AdapterCard) -> None:  # fmt: skip
    """Write a stock PEFT adapter with a README.md, completely or not at all.

    Args:
        state: The full tensors by PEFT's names, as `peft.get_peft_model_state_dict` returns them.
        config: PEFT's configuration.
        folder: The folder to create or replace.
        card: The content of README.md, with the name of the base.
    """
    with atomic_directory(folder) as partial:
        write_adapter(
            partial, state, config, BaseModelRef(card.base, card.revision, card.fingerprint)
        )
        atomic_write(partial / "README.md", render_card(card))


def write_adapter(
    folder: Path, state: Mapping[str, torch.Tensor], config: LoraConfig, base: BaseModelRef
) -> None:
    """Write the two files of a stock PEFT adapter into the existing `folder`."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_tensors(tensors, folder / WEIGHTS, **{_FINGERPRINT_KEY: base.fingerprint})
    # PEFT holds some lists as sets: sort them, so that equal adapters are equal files.
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    values |= {"base_model_name_or_path": base.name, "revision": base.revision}
    values["inference_mode"] = True  # as PEFT saves it
    atomic_write_json(folder / CONFIG, values)


def load_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA adapter from a folder.

    Raises:
        UserError: A file is missing or damaged, or the adapter contains more than the two LoRA
            matrices of each linear layer (DoRA, biases, whole modules), which hqqtrain cannot
            merge.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: contains no {name}; give the folder of a PEFT adapter.")
    config = _read_config(folder)
    state, metadata = _read_state(folder / WEIGHTS)
    _check_state(folder / WEIGHTS, state)
    return Adapter(config, state, metadata.get(_FINGERPRINT_KEY))


def _read_config(folder: Path) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: not a PEFT configuration ({error}).") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder / CONFIG}: peft_type={config.peft_type}: must be LORA.")
    if config.layer_replication:
        raise UserError(
            f"{folder / CONFIG}: layer_replication is not supported, as it changes the base."
        )
    return config


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}).") from error


def _check_state(path: Path, state: dict[str, torch.Tensor]) -> None:
    # Every name must have one of these suffixes, and its counterpart must exist as well.
    counterparts = {".lora_A.weight": ".lora_B.weight", ".lora_B.weight": ".lora_A.weight"}
    for name in state:
        suffix = name[-len(".lora_A.weight") :]
        counterpart = name.removesuffix(suffix) + counterparts.get(suffix, "")
        if suffix not in counterparts or counterpart not in state:
            raise UserError(f"{path}: {name} is not one of a pair of LoRA matrices.")
    if not state:
        raise UserError(f"{path}: contains no tensors.")
