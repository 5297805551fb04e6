"""List the inputs of a run, for `--check`, which looks at those on this machine.

Looking at files needs torch and seconds. The bundled model and the standard library need no check,
and nothing is downloaded.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.data_sources import source_paths
from hqqtrain.config.groups import AUTO, BUILT_IN_SOURCES
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig

BUNDLED = ("tiny", *BUILT_IN_SOURCES)
"""The model and the data that every installation has."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_FILE_NAME = re.compile(
    r".*\.(txt|text|md|py|rst|jsonl?|ndjson|parquet|[ct]sv|arrow|feather|gz|bz2|zst)", re.IGNORECASE
)


class Input(NamedTuple):
    """An input of a run: its kind, the key that names it, and the name."""

    kind: Literal[
        "model", "tokenizer", "adapter", "training text", "held-out text", "calibration text"
    ]
    key: str
    name: str

    @property
    def is_local(self) -> bool:
        """Whether the input is bundled, an existing file or folder, or can only be a path."""
        exists = self.name in BUNDLED or os.path.exists(os.path.expanduser(self.name))
        return bool(exists or _FILE_NAME.fullmatch(self.name) or not _HUB_NAME.fullmatch(self.name))


def list_inputs(config: RunConfig) -> Iterator[Input]:
    """Yield every input that the task of `config` uses."""
    held_out, data = config.eval.source, _source_to_check(config.data.source)
    kind: Literal["model", "tokenizer"] = (
        "tokenizer" if config.task in ("data", "plan") else "model"
    )
    yield Input(kind, "model.name_or_path", config.model.name_or_path)
    if config.adapter.init_from and config.task not in ("quantize", "data"):
        yield Input("adapter", "adapter.init_from", config.adapter.init_from)
    if config.task in ("finetune", "data"):
        yield Input("training text", "data.source", data)
    if config.task in ("finetune", "data", "eval") and held_out is not None:
        is_of_data = held_out in (AUTO, config.data.source)
        key = "data.source" if is_of_data else "eval.source"
        yield Input("held-out text", key, data if is_of_data else held_out)
    if config.quant.calibrates and config.task not in ("data", "plan"):
        source = config.quant.calibration_source
        if source is not None:
            yield Input("calibration text", "quant.calibration", source)
        elif config.task != "finetune":  # the training text, which is in the list above
            yield Input("calibration text", "data.source", data)


def _source_to_check(source: Any) -> str:
    """Return the source that decides whether all of `data.source` can be checked.

    That is one that is not on this machine, or one that every installation has only if all are.
    """
    inputs = [Input("training text", "data.source", path) for path in source_paths(source)]
    return min(inputs, key=lambda item: (item.is_local, item.name in BUNDLED)).name


def measures_tasks(config: RunConfig) -> bool:
    """Whether the run measures tasks of `eval.harness`, whose names are checked."""
    return bool(config.eval.harness) and config.task in ("finetune", "eval")


def has_prompts_file(config: RunConfig) -> bool:
    """Whether the run reads `generate.prompts_file`."""
    return config.generate.prompts_file is not None and config.task == "generate"


def has_inputs_to_check(config: RunConfig) -> bool:
    """Whether the run reads local files, depends on a local model, or measures tasks."""
    depends_on_model = (
        config.quant.skip != QuantConfig().skip
        or bool(config.quant.overrides)
        or config.adapter.target_modules != AdapterConfig().target_modules
        or config.eval.joins_texts  # in windows that may be too long for the model
    )
    return (
        measures_tasks(config)
        or has_prompts_file(config)
        or any(
            item.is_local
            and (item.name not in BUNDLED or (item.kind == "model" and depends_on_model))
            for item in list_inputs(config)
        )
    )
