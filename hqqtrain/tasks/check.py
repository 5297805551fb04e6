"""Check the inputs of a run for `--check`: model folder, patterns, adapter and texts.

Nothing is downloaded and nothing is written. Devices and the number of processes are not checked,
because the machine that checks may not be the one that runs.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

from hqqtrain.common.text import count
from hqqtrain.compose.inputs import is_local, named_inputs
from hqqtrain.config.groups import AUTO, AdapterConfig, OptimConfig, ParallelConfig, TrainConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.data.sources import load_held_out_texts, load_training_texts
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks.model import plan_settings
from hqqtrain.tracking.console import setup_logging


def check_inputs(config: RunConfig) -> list[str]:
    """Check the local inputs of `config`, and return one phrase for each that was checked.

    Raises:
        UserError: An input has a fault.
    """
    setup_logging()
    logging.getLogger("hqqtrain").setLevel(logging.WARNING)
    local = [key for key, name in named_inputs(config) if is_local(name)]
    phrases = [_check_model(config)] if "model.name_or_path" in local else []
    if "data.source" in local and config.task == "finetune":
        texts = load_training_texts(config.data, config.eval)
        phrases.append(_counted(f"data.source={config.data.source}", texts))
    if config.task in ("finetune", "eval") and config.eval.source is not None:
        is_of_data = config.eval.source in (AUTO, config.data.source)
        if is_local(config.data.source if is_of_data else config.eval.source):
            texts = load_held_out_texts(config.eval, config.data)
            phrases.append(_counted(f"eval.source={config.eval.source}", texts))
    return phrases


def _check_model(config: RunConfig) -> str:
    """Plan the model as the run would, and return how many layers and adapters it has."""
    settings = RuntimeSettings(
        ParallelConfig(), replace(config.quant, backend="auto", storage_dtype="auto"),
        AdapterConfig(), TrainConfig(precision="fp32"), OptimConfig(), trains=False,
    )  # fmt: skip
    plan = plan_model(plan_settings(config), Runtime.start(settings, PreemptionHandler(config.run)))
    adapters = sum(type(module).__name__ == "HQQLoraLinear" for module in plan.model.modules())
    layers = count(plan.num_quantized_linears, "quantized linear layer")
    return (
        f"model.name_or_path={config.model.name_or_path} ({layers}, {count(adapters, 'adapter')})"
    )


def _counted(key: str, texts: Iterable[str]) -> str:
    """Return `key` with the number of `texts`, which are read one by one and so checked."""
    return f"{key} ({count(sum(1 for _ in texts), 'text')})"
