"""`push_to_hub`: push a folder that hqqtrain has written to the Hugging Face Hub."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from hqqtrain.api.arguments import checked_group, folder_argument, named_as_arguments
from hqqtrain.common.errors import UserError
from hqqtrain.common.packed_folders import OWN_METHOD, gguf_files, quantized_by
from hqqtrain.common.reading import read_json
from hqqtrain.config.export import EXPORT_FORMATS
from hqqtrain.config.hub import HubConfig
from hqqtrain.config.public_function import public_function
from hqqtrain.formats.adapter_config import CONFIG
from hqqtrain.formats.quantized_settings import read_quantized_settings
from hqqtrain.quant.error import storage_bits
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import ExportMetrics, QuantizeMetrics, Summary, read_status
from hqqtrain.tasks.pushed_result import (
    Result,
    adapter_result,
    export_result,
    push_result,
    quantized_result,
    results_of_training,
)
from hqqtrain.tasks.pushed_run import PushedRun, hub_name


@public_function()
def push_to_hub(
    folder: str | os.PathLike[str], name: str, *, private: bool = True, base: str | None = None
) -> str:
    """Push a result to the Hugging Face Hub, with a model card.

    The token is that of `hf auth login`, or HF_TOKEN. What the Hub has already is not sent again,
    so the same call continues a push that was interrupted.

    Args:
        folder: The directory of a run; one of its folders `quantized/`, `adapter/` and `export/`;
            or a folder that `save_quantized`, `export` or `save_pretrained` of an adapter has
            written. The directory of a training is pushed as an adapter and its base.
        name: The repository, `user/name`.
        private: Whether a new repository is private.
        base: The repository of the base of an adapter, by default `name` with `-base` at the end.
            For a model, the repository of the full-precision model, for the model card.

    Returns:
        The address of the repository.

    Raises:
        UserError: The folder has no result, the Hub refuses it, or the connection has failed.
    """
    with named_as_arguments("push_to_hub", name="hub.push"):
        hub = checked_group(HubConfig, "hub", {"push": name, "private": private, "base": base})
        path = folder_argument(folder)
        run, url = _recorded(path, base), ""
        advice = "Call push_to_hub again to continue."
        for result in _results(path, hub):
            private_paths = [str(path), *run.paths]
            url = push_result(result, run, hub, private_paths, advice=advice)
        return url


def _results(path: Path, hub: HubConfig) -> list[Result]:
    """Return the results in a folder, in the order in which they are pushed."""
    run, name = RunLayout(path), hub.push
    if name is None:
        raise UserError("hub.push=null: must be the repository, user/name.")
    if run.config_yaml.is_file():
        status = read_status(run.status_json).status
        if status not in (None, "done"):
            raise UserError(f"folder={path}: the run is not complete ({status}); finish it.")
        if run.has_adapter:
            return results_of_training(
                run, hub, None if run.has_quantized else _dense_base(run, hub)
            )
        return [export_result(run.export, name)] if run.export.is_dir() else _results_in(run, name)
    if (path / CONFIG).is_file():
        return [adapter_result(path, name, hub.base_repository)]
    if quantized_by(path) == OWN_METHOD:
        return [quantized_result(path, name)]
    if (path / "config.json").is_file() or gguf_files(path):
        return [export_result(path, name)]
    raise UserError(
        f"folder={path}: has neither an adapter nor a model; give the directory of a run, its "
        "quantized/, adapter/ or export/, or a folder that save_quantized or export has written."
    )


def _dense_base(run: RunLayout, hub: HubConfig) -> str:
    """Return the repository of the full-precision base of a run's adapter."""
    recorded = read_json(run.adapter / CONFIG).get("base_model_name_or_path")
    base = hub.base or hub_name({"name_or_path": recorded})
    if base is None:
        raise UserError(
            f"base=None: the base of the adapter, {recorded}, is not on the Hub, so nobody else "
            "could load the adapter; give the repository that has the same weights."
        )
    return base


def _results_in(run: RunLayout, name: str) -> list[Result]:
    if not run.has_quantized:
        raise UserError(f"folder={run.folder}: the run has no result yet; finish it.")
    return [quantized_result(run.quantized, name)]


def _recorded(path: Path, base: str | None) -> PushedRun:
    """Return what the run of a folder records; for another folder, what its files say."""
    for folder in (path, path.resolve().parent):
        if RunLayout(folder).config_yaml.is_file():
            return PushedRun.read(folder)
    model = {"name_or_path": base or ""} if not (path / CONFIG).is_file() else {}
    return PushedRun({"model": model}, _summary(path))


def _summary(path: Path) -> Summary:
    """Return the part of a summary that the files of a model tell."""
    method = quantized_by(path)
    if method == OWN_METHOD and not (path / CONFIG).is_file():
        return Summary(quantize=_quantize_metrics(path))
    export_format = method if method in EXPORT_FORMATS else "dense"
    form = "separate" if (path / "adapter").is_dir() else None
    return Summary(export=ExportMetrics(format=export_format, adapter_form=form))


def _quantize_metrics(path: Path) -> QuantizeMetrics:
    """Return the settings that most layers of a quantized folder have, and their bits."""
    settings = read_quantized_settings(path)
    modules = list(settings.modules.values())
    keys = ("nbits", "group_size", "axis", "solver")
    counted = Counter(tuple(getattr(module, key) for key in keys) for module in modules)
    values: dict[str, Any] = dict(zip(keys, counted.most_common(1)[0][0], strict=True))
    weights = sum(module.out_features * module.in_features for module in modules)
    bits = sum(storage_bits(module.layout, module.spec.meta_dtype) for module in modules)
    return replace(
        QuantizeMetrics(**values),
        bits_per_weight=bits / weights, weights=weights, fingerprint=settings.fingerprint,
    )  # fmt: skip
