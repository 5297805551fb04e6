"""Decide whether `--check` must look at files, which needs torch and seconds.

The bundled model and the standard library need no check, and models on the hub are not downloaded.
"""

from pathlib import Path

from hqqtrain.config.groups import AdapterConfig, QuantConfig
from hqqtrain.config.run import RunConfig

BUNDLED_TEXT = "python_stdlib"


def has_inputs_to_check(config: RunConfig) -> bool:
    """Whether the run reads local files, or selects layers of a model that is on this machine."""
    if is_local_model(config) and config.model.name_or_path != "tiny":
        return True
    uses_patterns = (
        config.quant.skip != QuantConfig().skip
        or bool(config.quant.overrides)
        or config.adapter.target_modules != AdapterConfig().target_modules
    )
    if config.adapter.init_from or (uses_patterns and is_local_model(config)):
        return True
    trains, evaluates = config.task == "finetune", config.task in ("finetune", "eval")
    sources: set[str | None] = {config.data.source} if trains else set()
    sources |= {config.eval.source} if evaluates else set()
    return bool(sources - {None, "auto", BUNDLED_TEXT})


def is_local_model(config: RunConfig) -> bool:
    """Whether `model.name_or_path` is bundled, a folder, or can only be a path."""
    name = config.model.name_or_path
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return name == "tiny" or is_path or Path(name).expanduser().is_dir()
