"""Check the inputs of a run for `--check`: model folder, patterns, adapter and texts.

Nothing is downloaded and nothing is written. Devices and the number of processes are not checked,
because the machine that checks may not be the one that runs.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

from hqqtrain.common.text import count
from hqqtrain.compose.inputs import is_local_model
from hqqtrain.config.groups import (
    AdapterConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from hqqtrain.config.run import RunConfig
from hqqtrain.data.sources import (
    evaluates_on_training_source,
    is_hub_name,
    load_held_out_texts,
    load_training_texts,
)
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks.model import plan_settings
from hqqtrain.tracking.console import setup_logging


def check_inputs(config: RunConfig) -> list[str]:
    """Check the inputs of `config`, and return one phrase for each that was checked or was not.

    Raises:
        UserError: An input has a fault.
    """
    setup_logging()
    logging.getLogger("hqqtrain").setLevel(logging.WARNING)
    return [_check_model(config), *_check_texts(config)]


def _check_model(config: RunConfig) -> str:
    name = f"model.name_or_path={config.model.name_or_path}"
    if not is_local_model(config):
        return f"{name} is on the hub and was not checked"
    settings = RuntimeSettings(
        ParallelConfig(), replace(config.quant, backend="auto", storage_dtype="auto"),
        AdapterConfig(), TrainConfig(precision="fp32"), OptimConfig(), trains=False,
    )  # fmt: skip
    plan = plan_model(plan_settings(config), Runtime.start(settings, PreemptionHandler(config.run)))
    adapters = sum(type(module).__name__ == "HQQLoraLinear" for module in plan.model.modules())
    layers = count(plan.num_quantized_linears, "quantized linear layer")
    return f"{name} ({layers}, {count(adapters, 'adapter')})"


def _check_texts(config: RunConfig) -> list[str]:
    """Read the texts that the task uses, except for those on the hub."""
    phrases = []
    if config.task == "finetune":
        key = f"data.source={config.data.source}"
        if is_hub_name(config.data.source):
            phrases.append(f"{key} is on the hub and was not checked")
        else:
            phrases.append(_counted(key, load_training_texts(config.data, config.eval)))
    if config.task in ("finetune", "eval") and config.eval.source is not None:
        key = f"eval.source={config.eval.source}"
        of_training = evaluates_on_training_source(config.eval, config.data)
        if is_hub_name(config.data.source if of_training else config.eval.source):
            phrases.append(f"{key} was not checked")
        else:
            phrases.append(_counted(key, load_held_out_texts(config.eval, config.data)))
    return phrases


def _counted(key: str, texts: Iterable[str]) -> str:
    """Return `key` with the number of `texts`, which are read one by one and so checked."""
    return f"{key} ({count(sum(1 for _ in texts), 'text')})"
