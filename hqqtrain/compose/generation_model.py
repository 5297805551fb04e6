"""The model of task=generate: by default the result of the run that the same settings train.

The command that has trained a run, with task=generate at its end, uses its result. A command that
names a run or a model uses that one.
"""

from collections.abc import Collection
from dataclasses import fields, replace
from glob import escape
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.common.packed_folders import is_quantized
from hqqtrain.common.secrets import MASK
from hqqtrain.compose.run_settings import run_of
from hqqtrain.config.generate import FULL_PRECISION, QUANTIZED, TRAINED
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.yaml_file import read_yaml

_NAME = "model.name_or_path"


def select_run(config: RunConfig, given: Collection[str]) -> RunLayout | None:
    """Return the run whose result task=generate uses; None if it uses a model.

    Args:
        config: The settings of the command.
        given: Dotted keys that the command line sets.

    Raises:
        UserError: The command names no model, and no run has been trained with its settings.
    """
    if run := run_of(config):
        return run
    training = _training(config)
    run = RunLayout(Path(config.run.root).expanduser() / training.run_name())
    if run.config_yaml.is_file() and (run.has_adapter or run.has_quantized):
        return run
    if _NAME in given or config.generate.use in (QUANTIZED, FULL_PRECISION):
        return None
    raise _no_run_error(config, run)


def use_model(config: RunConfig, run: RunLayout | None, given: Collection[str]) -> None:
    """Set the keys of `config` that select the model as `generate.use` says.

    Args:
        config: The configuration, changed in place.
        run: The result of `select_run`.
        given: Dotted keys that the command line sets.

    Raises:
        UserError: There is no such model.
    """
    use, adapter = config.generate.use, config.adapter.init_from
    if use == TRAINED and not adapter and not (run and run.has_adapter):
        name = run.folder if run else config.model.name_or_path
        raise UserError(f"generate.use=trained: {name} has no adapter; train one, or use auto.")
    if use in (QUANTIZED, FULL_PRECISION) and adapter:
        raise UserError(
            f"generate.use={use}: leaves out the adapter of adapter.init_from={adapter}; leave one "
            "of the two out."
        )
    if use == FULL_PRECISION:
        _use_full_precision(config, run)
    elif run and use == QUANTIZED and not run.has_quantized:
        raise UserError(
            f"generate.use=quantized: {run.folder} has quantized nothing; use full_precision."
        )
    elif run:
        folder = run.quantized if use == QUANTIZED else _named_folder(config, run)
        config.model = ModelConfig(name_or_path=str(folder))
    elif use == "auto" and not (_is_quantized(config) or _asks_for_quantization(config, given)):
        config.quant = QuantConfig(nbits=None)


def _named_folder(config: RunConfig, run: RunLayout) -> Path | str:
    """Return the run, or the folder in it that the command names."""
    return config.model.name_or_path if run_of(config) else run.folder


def _use_full_precision(config: RunConfig, run: RunLayout | None) -> None:
    """Let `config` use the model that was quantized."""
    if run:
        config.model = _original_model(run)
    if _is_quantized(config):
        raise UserError(
            f"generate.use=full_precision: {_NAME}={config.model.name_or_path} is quantized; name "
            "the model that it was made from."
        )
    config.quant = QuantConfig(nbits=None)


def _original_model(run: RunLayout) -> ModelConfig:
    """Return the model from which `run` has started.

    Raises:
        UserError: config.yaml does not say it, or hides a secret in it.
    """
    model = read_yaml(run.config_yaml).get("model")
    known: dict[str, Any] = {}
    if isinstance(model, dict):
        known = {f.name: model[f.name] for f in fields(ModelConfig) if f.name in model}
    if "name_or_path" not in known or MASK in str(known):
        raise UserError(
            f"generate.use=full_precision: {run.config_yaml} does not say which model was "
            f"quantized; name it in {_NAME}."
        )
    return ModelConfig(**known)


def _is_quantized(config: RunConfig) -> bool:
    """Whether the model is a local folder with quantized weights."""
    return is_quantized(Path(config.model.name_or_path).expanduser())


def _asks_for_quantization(config: RunConfig, given: Collection[str]) -> bool:
    """Whether the command or its recipe says how to quantize a model."""
    return config.quant != QuantConfig() or any(key.split(".")[0] == "quant" for key in given)


def _training(config: RunConfig) -> RunConfig:
    """Return the configuration of the training with the settings of `config`."""
    values = {item.name: getattr(config, item.name) for item in fields(RunConfig)}
    return replace(RunConfig(**values), task="finetune")


def _no_run_error(config: RunConfig, run: RunLayout) -> UserError:
    """Return the error for a command without a model whose run does not exist."""
    others = _other_runs(config, run)
    hint = f" Other runs of this recipe: {', '.join(others)}." if others else ""
    state = "is not finished" if run.config_yaml.is_file() else "does not exist"
    return UserError(
        f"task=generate: uses the run that the same settings have trained, but {run.folder} "
        f"{state}. Train it with the same command without task=generate; or name a run or a model, "
        f"as in {_NAME}=runs/mine; or use the model of these settings before training, with "
        f"generate.use=quantized.{hint}"
    )


def _other_runs(config: RunConfig, run: RunLayout) -> list[str]:
    """Return the folders of trained runs of the same recipe, which have other settings."""
    folders = run.folder.parent.glob(f"{escape(config.recipe)}-*") if config.recipe else ()
    return sorted(str(folder) for folder in folders if RunLayout(folder).has_adapter)
