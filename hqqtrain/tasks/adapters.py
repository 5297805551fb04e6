"""Initial values of the adapters: fresh ones, seeded by name, or those of an existing adapter."""

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from torch import nn

from hqqtrain.ckpt import Adapter, DamagedError, load_adapter
from hqqtrain.ckpt.manifest import check_sealed, is_sealed
from hqqtrain.config import RunConfig, UserError
from hqqtrain.dist import write_full
from hqqtrain.models import Source, adapter_name, is_adapter
from hqqtrain.nn import init_adapters


@dataclass(frozen=True)
class Start:
    """An existing adapter that gives the initial values."""

    folder: Path
    adapter: Adapter
    where: str
    """The beginning of messages about it: the folder, and the setting that selected it."""


def load_start(config: RunConfig, source: Source, resumed: Path | None) -> Start | None:
    """Load the adapter to start from, or return None if the run starts with fresh adapters.

    The first that is set is used: the checkpoint folder `resumed`, `adapter.init_from`, the
    adapter of the run that `model.name_or_path` names.

    Raises:
        UserError: The adapter cannot be read, or a sealed folder was altered.
    """
    folder = resumed or config.adapter.init_from or source.adapter
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    if resumed:
        where = (
            f"{folder}: the checkpoint that the run resumes from (another run.name starts from "
            "scratch)"
        )
    elif config.adapter.init_from:
        where = f"adapter.init_from={folder}"
    else:
        where = f"{folder}: the adapter of model.name_or_path={source.name}"
    if not resumed:  # the manifest of `resumed` was checked when the checkpoint was read
        _check_manifest(folder, where)
    return Start(folder, load_adapter(folder), where)


def _check_manifest(folder: Path, where: str) -> None:
    """Refuse a sealed folder whose files were altered: training would start from it silently."""
    try:
        if is_sealed(folder):
            check_sealed(folder)
    except DamagedError as error:
        raise UserError(f"{where}: {error}. Use another checkpoint of that run.") from error


def unknown_base(start: Start, source: Source) -> str:
    """Return a warning if `start` does not record the base it was trained on, or ""."""
    if start.adapter.fingerprint:
        return ""  # `fill_adapters` compares it with the fingerprint of the base
    named = start.adapter.config.base_model_name_or_path or "no model"
    return (
        f"{start.where}: does not record the quantized base it was trained on, and names {named}; "
        f"if that is not model.name_or_path={source.name}, the adapter adds noise."
    )


def check_start(start: Start | None, lora: LoraConfig) -> None:
    """Check that the adapter to start from has the rank and the scaling of the new adapter.

    Raises:
        UserError: They differ.
    """
    if start is None:
        return
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        saved, wanted = getattr(start.adapter.config, key), getattr(lora, key)
        if saved != wanted:
            raise UserError(
                f"{start.where}: was made with {key}={saved}, the recipe "
                f"asks for {wanted}. Make adapter.r, adapter.alpha and adapter.kind agree."
            )


def fill_adapters(
    model: nn.Module, start: Start | None, fingerprint: str, config: RunConfig
) -> None:
    """Write the initial values of every adapter in `model`, sharded or not.

    Without `start`, they are initialized by `adapter.init` from `train.seed`. `fingerprint` is
    that of the quantized base in `model`.

    Raises:
        UserError: `start` was trained on another base or on other modules.
    """
    init_adapters(model, config.train.seed, config.adapter.init, write=write_full)
    if start is None:
        return
    start.adapter.check_base(fingerprint, start.where)
    unused = dict(start.adapter.state)
    for name, param in model.named_parameters():
        if is_adapter(name):
            saved = unused.pop(adapter_name(name), None)
            if saved is None or saved.shape != param.shape:
                raise UserError(
                    f"{start.where}: has no {name} of shape {list(param.shape)}; it was trained "
                    "with other adapter.target_modules."
                )
            write_full(param, saved)
    if unused:
        raise UserError(f"{start.where}: {next(iter(unused))} does not exist in this model.")
