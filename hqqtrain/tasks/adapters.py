"""The adapters' first values: fresh by their names, or those of an adapter to begin with."""

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from torch import nn

from hqqtrain.ckpt import Adapter, load_adapter
from hqqtrain.config import RunConfig, UserError
from hqqtrain.dist import write_full
from hqqtrain.models import Source, adapter_name, is_adapter
from hqqtrain.nn import init_adapters


@dataclass(frozen=True)
class Start:
    """An adapter to begin with, the folder it was read from, and in words what asked for it."""

    folder: Path
    adapter: Adapter
    where: str


def load_start(config: RunConfig, source: Source, resumed: Path | None) -> Start | None:
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
    return Start(folder, load_adapter(folder), where)


def check_start(start: Start | None, lora: LoraConfig) -> None:
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


def fill_adapters(
    model: nn.Module, start: Start | None, fingerprint: str, config: RunConfig
) -> None:
    """Gives every adapter in `model`, sharded or not, its first values.

    Raises:
        UserError: `start` belongs to another base than `fingerprint`, or to other modules.
    """
    init_adapters(model, config.train.seed, config.adapter.init, write=write_full)
    if start is None:
        return
    start.adapter.check_base(fingerprint, start.where)
    waiting = dict(start.adapter.state)
    for name, param in model.named_parameters():
        if is_adapter(name):
            saved = waiting.pop(adapter_name(name), None)
            if saved is None or saved.shape != param.shape:
                raise UserError(
                    f"{start.where}: holds no {name} of shape {list(param.shape)}; it was trained "
                    "with other adapter.target_modules."
                )
            write_full(param, saved)
    if waiting:
        raise UserError(f"{start.where}: {next(iter(waiting))} has no place in this model.")
