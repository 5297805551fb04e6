"""Tell the inputs of a run that are on this machine, which `--check` looks at, from the hub's.

Looking at files needs torch and seconds. The bundled model and the standard library need no check,
and nothing is downloaded.
"""

import os
import re
from collections.abc import Iterator

from hqqtrain.config.groups import AUTO, AdapterConfig, QuantConfig
from hqqtrain.config.run import RunConfig

BUNDLED = ("tiny", "python_stdlib")
"""The model and the text that every installation has."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_FILE_NAME = re.compile(r".*\.(txt|text|md|py|rst|jsonl?|parquet|csv|gz|bz2|zst)", re.IGNORECASE)


def has_inputs_to_check(config: RunConfig) -> bool:
    """Whether the run reads local files, or selects layers of a model that is on this machine."""
    uses_patterns = (
        config.quant.skip != QuantConfig().skip
        or bool(config.quant.overrides)
        or config.adapter.target_modules != AdapterConfig().target_modules
    )
    if config.adapter.init_from or (uses_patterns and is_local(config.model.name_or_path)):
        return True
    return any(is_local(name) and name not in BUNDLED for _, name in named_inputs(config))


def named_inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of the model and of every text that the task uses."""
    yield "model.name_or_path", config.model.name_or_path
    if config.task == "finetune" or (config.task == "eval" and config.eval.source == AUTO):
        yield "data.source", config.data.source
    held_out = config.eval.source
    if config.task in ("finetune", "eval") and held_out not in (None, AUTO, config.data.source):
        yield "eval.source", str(held_out)


def is_local(name: str) -> bool:
    """Whether `name` is bundled, names a file or folder, or can only be a path."""
    if name in BUNDLED or os.path.exists(os.path.expanduser(name)) or _FILE_NAME.fullmatch(name):
        return True
    return not _HUB_NAME.fullmatch(name)
