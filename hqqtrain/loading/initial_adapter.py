"""The adapters' first values: fresh by their names, or those of an adapter to begin with."""

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.local import copy_from_full
from hqqtrain.formats.manifest import DamagedError, check_sealed, is_sealed
from hqqtrain.formats.peft import Adapter, load_adapter
from hqqtrain.models.fqn import is_adapter, peft_key
from hqqtrain.models.source import ModelSource
from hqqtrain.nn.lora import init_adapters


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter to begin with, the folder it was read from, and in words what asked for it."""

    folder: Path
    adapter: Adapter
    where: str


def load_initial_adapter(
    config: RunConfig, source: ModelSource, resumed: Path | None
) -> InitialAdapter | None:
    """Of the checkpoint `resumed`, else `adapter.init_from`, else beside the model; or None.

    Raises UserError where it cannot be read.
    """
    folder = resumed or config.adapter.init_from or source.adapter
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    if resumed:
        where = f"{folder}: the checkpoint that the run goes on from (another run.name begins anew)"
    elif config.adapter.init_from:
        where = f"adapter.init_from={folder}"
    else:
        where = f"{folder}: the adapter of model.name_or_path={source.name}"
    if not resumed:  # else it was read a moment ago
        _check_sealed(folder, where)
    return InitialAdapter(folder, load_adapter(folder), where)


def _check_sealed(folder: Path, where: str) -> None:
    """A checkpoint knows its bytes: one that was altered would train without a complaint."""
    try:
        if is_sealed(folder):
            check_sealed(folder)
    except DamagedError as error:
        raise UserError(f"{where}: {error}. Take another checkpoint of that run.") from error


def unknown_base_warning(start: InitialAdapter, source: ModelSource) -> str:
    """What to warn of where nothing tells whether `start` belongs to this base; else nothing."""
    if start.adapter.fingerprint:
        return ""  # which `initialize_adapters` compares
    named = start.adapter.config.base_model_name_or_path or "no model"
    return (
        f"{start.where}: does not say which quantized base it was trained on, and names {named}; "
        f"on another than model.name_or_path={source.name} it is noise."
    )


def check_initial_adapter(start: InitialAdapter | None, lora: LoraConfig) -> None:
    """It gives the first values, so its shape and scaling must be those of the new adapter.

    Raises:
        UserError: they differ.
    """
    if start is None:
        return
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    theirs = {key: getattr(start.adapter.config, key) for key in keys}
    ours = {key: getattr(lora, key) for key in keys}
    for key in keys:
        if theirs[key] != ours[key]:
            raise UserError(
                f"{start.where}: was made with {key}={theirs[key]}, the recipe "
                f"asks for {ours[key]}. Make adapter.r, adapter.alpha and adapter.kind agree."
            )


def initialize_adapters(
    model: nn.Module, start: InitialAdapter | None, fingerprint: str, config: RunConfig
) -> None:
    """Gives every adapter in `model`, sharded or not, its first values.

    Raises:
        UserError: `start` belongs to another base than `fingerprint`, or to other modules.
    """
    init_adapters(model, config.train.seed, config.adapter.init, write=copy_from_full)
    if start is None:
        return
    start.adapter.check_base(fingerprint, start.where)
    waiting = dict(start.adapter.state)
    for name, param in model.named_parameters():
        if is_adapter(name):
            saved = waiting.pop(peft_key(name), None)
            if saved is None or saved.shape != param.shape:
                raise UserError(
                    f"{start.where}: holds no {name} of shape {list(param.shape)}; it was trained "
                    "with other adapter.target_modules."
                )
            copy_from_full(param, saved)
    if waiting:
        raise UserError(f"{start.where}: {next(iter(waiting))} has no place in this model.")
