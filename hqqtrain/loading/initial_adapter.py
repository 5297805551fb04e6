"""Initial values of the adapters: fresh ones, seeded by name, or those of an existing adapter."""

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import AdapterConfig
from hqqtrain.distributed.local import copy_from_full
from hqqtrain.formats.manifest import DamagedError, check_sealed, is_sealed
from hqqtrain.formats.peft import Adapter, load_adapter
from hqqtrain.models.fqn import is_adapter, peft_key
from hqqtrain.models.source import ModelSource
from hqqtrain.nn.lora import init_adapters


@dataclass(frozen=True)
class InitialAdapter:
    """An existing adapter that gives the initial values.

    Attributes:
        folder: The folder of the adapter.
        adapter: Its configuration and tensors.
        origin: The beginning of messages: the folder and the setting that selected it.
    """

    folder: Path
    adapter: Adapter
    origin: str


def load_initial_adapter(
    config: AdapterConfig, source: ModelSource, resumed: Path | None
) -> InitialAdapter | None:
    """Load the adapter to start from, or return None if the run starts with fresh adapters.

    The function uses the first of these that is set: the checkpoint folder `resumed`,
    `adapter.init_from`, the adapter of the run that `model.name_or_path` names.

    Raises:
        UserError: The adapter cannot be read, is missing, or a sealed folder was altered.
    """
    folder = resumed or config.init_from or source.adapter
    if folder is None and source.lacks_adapter:
        raise UserError(
            f"model.name_or_path={source.name}: is a run that trains an adapter, but its adapter/ "
            f"is missing. Run its command again, which writes adapter/; or name {source.path} to "
            "use the base without adapter."
        )
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    if resumed:
        origin = (
            f"{folder}: the checkpoint that the run resumes from (another run.name starts from "
            "scratch)"
        )
    elif config.init_from:
        origin = f"adapter.init_from={folder}"
    else:
        origin = f"{folder}: the adapter of model.name_or_path={source.name}"
    if not resumed:  # the manifest of `resumed` was checked when the checkpoint was read
        _check_manifest(folder, origin)
    return InitialAdapter(folder, load_adapter(folder), origin)


def _check_manifest(folder: Path, origin: str) -> None:
    """Refuse a sealed folder whose files were altered; otherwise nobody would notice it.

    Folders of other tools have no manifest and are not checked.
    """
    try:
        if is_sealed(folder):
            check_sealed(folder)
    except DamagedError as error:
        raise UserError(f"{origin}: {error}. Use another checkpoint of that run.") from error


def unknown_base_warning(start: InitialAdapter, source: ModelSource) -> str:
    """Return a warning if `start` does not record the base it was trained on, or ""."""
    if start.adapter.fingerprint:
        return ""  # `initialize_adapters` compares it with the fingerprint of the base
    base_name = start.adapter.config.base_model_name_or_path or "no model"
    return (
        f"{start.origin}: does not record the quantized base it was trained on, and names "
        f"{base_name}; if that is not model.name_or_path={source.name}, the adapter adds noise."
    )


def check_initial_adapter(start: InitialAdapter | None, lora: LoraConfig) -> None:
    """Check that the adapter to start from has the rank and the scaling of the new adapter.

    Raises:
        UserError: The ranks or scalings differ.
    """
    if start is None:
        return
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        saved, configured = getattr(start.adapter.config, key), getattr(lora, key)
        if saved != configured:
            raise UserError(
                f"{start.origin}: was made with {key}={saved}, the recipe "
                f"asks for {configured}. Make adapter.r, adapter.alpha and adapter.kind agree."
            )


def initialize_adapters(
    model: nn.Module,
    start: InitialAdapter | None,
    fingerprint: str,
    config: AdapterConfig,
    seed: int,
) -> None:
    """Write the initial values of every adapter in `model`, sharded or not.

    Args:
        model: The model, with its adapters.
        start: The existing adapter, if any. Without one, `adapter.init` gives the values.
        fingerprint: Fingerprint of the quantized base in `model`.
        config: Settings of the adapters.
        seed: Seed of fresh values, `train.seed`.

    Raises:
        UserError: `start` was trained on another base or on other modules.
    """
    init_adapters(model, seed, config.init, write=copy_from_full)
    if start is None:
        return
    start.adapter.check_base(fingerprint, start.origin)
    remaining = dict(start.adapter.state)
    for name, param in model.named_parameters():
        if is_adapter(name):
            saved = remaining.pop(peft_key(name), None)
            if saved is None or saved.shape != param.shape:
                raise UserError(
                    f"{start.origin}: has no {name} of shape {list(param.shape)}; it was trained "
                    "with other adapter.target_modules."
                )
            copy_from_full(param, saved)
    if remaining:
        raise UserError(f"{start.origin}: {next(iter(remaining))} does not exist in this model.")
