"""Check the inputs of a run for `--check`: model folder, patterns, adapter and texts.

Every input is checked, so that all faults are reported at once. Nothing is downloaded and nothing
is written. Devices and the number of processes are not checked,
because the machine that checks may not be the one that runs.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from peft.tuners.lora.layer import Linear as LoraLinear

from hqqtrain.common.errors import ErrorCollector, UserError
from hqqtrain.common.text import count
from hqqtrain.compose.inputs import has_prompts_file, list_inputs, measures_tasks
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.groups import AUTO
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.data.encoding import add_refused, encode_or_refuse
from hqqtrain.data.examples import Example
from hqqtrain.data.joined_text import joined_rows
from hqqtrain.data.streaming.sources import SHOWN_EXAMPLES
from hqqtrain.data.texts import held_out_texts, training_texts
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.evaluation.harness import find_tasks
from hqqtrain.formats.peft import load_adapter
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks.calibration import calibration_config, calibration_errors
from hqqtrain.tasks.data import load_data_model
from hqqtrain.tasks.model import plan_settings
from hqqtrain.tasks.prompts import read_prompts_file
from hqqtrain.tracking.console import setup_logging


def check_inputs(config: RunConfig) -> list[str]:
    """Check the local inputs of `config`, and return one phrase for each that was checked.

    Raises:
        UserError: Inputs have faults. The message has a line for each.
    """
    setup_logging()
    logging.getLogger("hqqtrain").setLevel(logging.WARNING)
    phrases, errors = [], ErrorCollector()
    for item in list_inputs(config):
        if item.is_local:
            with errors.collect():
                phrases.append(_CHECKS[item.kind](config))
    if measures_tasks(config):
        with errors.collect():
            find_tasks(config.eval.harness)
            phrases.append(f"eval.harness=[{','.join(config.eval.harness)}]")
    if has_prompts_file(config):
        with errors.collect():
            read_prompts_file(config.generate.prompts_file)
            phrases.append(f"generate.prompts_file={config.generate.prompts_file}")
    errors.raise_if_any()  # two checks find the same fault if they read the same file
    return phrases


def _check_model(config: RunConfig) -> str:
    """Plan the model as the run would, and return how many layers and adapters it has."""
    settings = RuntimeSettings.of_any_machine(config.quant)
    runtime = Runtime.start(settings, PreemptionHandler(config.run))
    try:
        plan = plan_model(plan_settings(config), runtime)
    except UserError as error:
        if not str(error).startswith("quant."):
            raise
        raise UserError("\n".join([str(error), *_adapter_faults(config, runtime)])) from error
    adapters = sum(isinstance(module, LoraLinear) for module in plan.model.modules())
    kind = "quantized linear layer" if config.quant.quantizes else "unquantized linear layer"
    layers = count(plan.num_linears, kind)
    return (
        f"model.name_or_path={config.model.name_or_path} ({layers}, {count(adapters, 'adapter')})"
    )


def _check_tokenizer(config: RunConfig) -> str:
    """Load all of the model that task=data needs."""
    load_data_model(config.model, config.data)
    return f"model.name_or_path={config.model.name_or_path} (its tokenizer)"


def _adapter_faults(config: RunConfig, runtime: Runtime) -> list[str]:
    """Return the fault of `adapter.target_modules`, if any, in spite of one of the keys of quant.

    The model is planned again, with settings that fit every layer. Other faults may come from
    that.
    """
    quant = QuantConfig(nbits=None)
    try:
        plan_model(plan_settings(replace(config, quant=quant)), runtime)
    except UserError as error:
        return [str(error)] if str(error).startswith("adapter.target_modules") else []
    return []


def _check_adapter(config: RunConfig) -> str:
    """Read the adapter, also if the model that it must fit is missing or not on this machine."""
    folder = Path(config.adapter.init_from or "").expanduser()
    origin = f"adapter.init_from={folder}"
    load_adapter(folder, origin=origin)
    return origin


def _check_training_text(config: RunConfig) -> str:
    """Read the training text, and encode the first chats of each source.

    The first fault may be one of the held-out text, which is read before. So if there is one, each
    source is read alone, for the faults of all of them.
    """
    data, errors, checked, refused = config.data, ErrorCollector(), "", set[str]()
    with errors.collect():
        texts = training_texts(data, config.eval)
        checked = _counted(f"data.source={describe_source(data.source)}", texts)
    for source in data.source if isinstance(data.source, list) else [data.source]:
        alone = replace(data, source=[source])
        where = f"data.source={describe_source(alone.source)}"
        with errors.collect():
            texts = training_texts(alone, replace(config.eval, source=None))
            if not checked:
                _counted(where, texts)
            _check_chats(config, texts, where, refused)
    errors.raise_if_any()
    return checked


def _check_chats(
    config: RunConfig, texts: Iterable[Example], where: str, refused: set[str]
) -> None:
    """Encode the first examples other than plain text, which the chat template may refuse.

    Those that are left out are added to `refused`, because data.max_bad_rows counts them all.
    Nothing is encoded if the tokenizer is not on this machine.
    """
    if not any(
        item.kind in ("model", "tokenizer") and item.is_local for item in list_inputs(config)
    ):
        return
    first = (each for each in islice(texts, SHOWN_EXAMPLES) if not isinstance(each, str))
    if (example := next(first, None)) is not None:
        tokenizer, data = load_data_model(config.model, config.data).tokenizer, config.data
        chats = chain([example], first)
        for encoded in encode_or_refuse(chats, tokenizer, data, where, on_batch=lambda: None):
            if isinstance(encoded, UserError):
                add_refused(refused, data.max_bad_rows, encoded)


def _check_held_out_text(config: RunConfig) -> str:
    where = f"eval.source={config.eval.source}"
    if config.eval.joins_texts:
        return _counted(where, joined_rows(config.eval, config.data))
    texts = held_out_texts(config.eval, config.data)
    checked = _counted(where, texts)
    if config.eval.source == AUTO:  # a fault of both parts is one line
        where = f"data.source={describe_source(config.data.source)}"
    _check_chats(config, texts, where, set())
    return checked


def _check_calibration_text(config: RunConfig) -> str:
    """Read the calibration text, and encode its first chats."""
    as_training = calibration_config(config)
    with calibration_errors(config):
        texts = training_texts(as_training.data, as_training.eval)
        checked = _counted(f"quant.calibration={config.quant.calibration}", texts)
        where = f"data.source={describe_source(as_training.data.source)}"
        _check_chats(as_training, texts, where, set())
    return checked


def _counted(key: str, texts: Iterable[Example]) -> str:
    """Return `key` with the number of `texts`, which are read one by one and so checked."""
    return f"{key} ({count(sum(1 for _ in texts), 'text')})"


_CHECKS: dict[str, Callable[[RunConfig], str]] = {
    "model": _check_model,
    "tokenizer": _check_tokenizer,
    "adapter": _check_adapter,
    "training text": _check_training_text,
    "held-out text": _check_held_out_text,
    "calibration text": _check_calibration_text,
}
"""The check of each kind of input."""
