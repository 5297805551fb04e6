"""Resolve `model.name_or_path` and `model.source` to an architecture and weights.

Quantization, training, evaluation and export all ask this module, so that they agree.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.common.packed_folders import (
    FOREIGN_METHODS,
    GGUF_SUFFIX,
    GPTQ_CONFIG,
    OWN_METHOD,
    quantized_by,
)
from hqqtrain.common.reading import load_json, read_json
from hqqtrain.common.secrets import MASK
from hqqtrain.config.model import ModelConfig
from hqqtrain.models.foreign.gguf_folder import prepared_folder, the_gguf_file
from hqqtrain.models.foreign.qmodel import converted_folder
from hqqtrain.models.hub import download_snapshot
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.results import TRAINED_RESULTS, check_results
from hqqtrain.rundir.yaml_file import read_yaml

TINY_FOLDER = Path(__file__).parent / "tiny"

_CONFIG_FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ModelSource:
    """A folder with config.json, tokenizer and safetensors files, and the kind of its weights.

    Attributes:
        name: The name that the user gave. If it is a run that has quantized nothing, the name of
            the model that the run has trained.
        path: The folder.
        kind: `dense` weights, `quantized` weights, or `synthetic` weights, which need only the
            folder's config.json.
        adapter: The folder of the adapter, if `name` is a run's directory that has one.
        lacks_adapter: Whether `name` is the directory of a run that trains an adapter, which is
            missing.
        tokenizer_folder: The folder of a tokenizer to use instead of the model's own.
        trained_token_ids: The ids of its tokens whose embeddings are trained. The model may have no
            rows for them yet.
        foreign: The format of the `quantized` weights if another program has written them, a key of
            `hqqtrain.models.foreign.registry.FORMATS`.
        original: The folder of the tokenizer if `path`, a conversion, has none.
        weights_file: The GGUF file with the weights of `path`.
    """

    name: str
    path: Path
    kind: Literal["dense", "quantized", "synthetic"]
    adapter: Path | None = None
    lacks_adapter: bool = False
    tokenizer_folder: Path | None = None
    trained_token_ids: tuple[int, ...] = ()
    foreign: str | None = None
    original: Path | None = None
    weights_file: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer; synthetic models use the bundled one."""
        if self.tokenizer_folder:
            return self.tokenizer_folder
        return TINY_FOLDER if self.kind == "synthetic" else self.original or self.path


def resolve_source(model: ModelConfig, *, weights: bool = True) -> ModelSource:
    """Find the folder that `model` names, or download it from the hub.

    Args:
        model: The group `model` of the configuration.
        weights: Whether to download weights, not only configuration and tokenizer.

    Raises:
        UserError: The model is missing, unreachable or in another format.
    """
    name = model.name_or_path
    if model.source == "synthetic":
        return _synthetic(model)
    folder = TINY_FOLDER if name == "tiny" else Path(os.path.expanduser(name))
    # Unlike those of Path, these functions find that a name is too long to be a path.
    if os.path.isdir(folder):
        _refuse_revision(model)
        return _from_folder(name, folder)
    if os.path.isfile(folder) and folder.suffix == GGUF_SUFFIX:
        _refuse_revision(model)
        return _from_gguf(name, folder)
    if os.path.exists(folder):
        raise UserError(f"model.name_or_path={name}: is a file; give the folder that contains it.")
    if _is_path(name):
        siblings = (
            [p.name for p in folder.parent.glob("*/")] if os.path.isdir(folder.parent) else []
        )
        hint = did_you_mean(folder.name, siblings)
        raise UserError(f"model.name_or_path={name}: no such folder.{hint}")
    return _from_folder(name, download_snapshot(name, model.revision, weights=weights))


def shipped_folder(name: str) -> Path | None:
    """Return the folder of this package with the config.json of a well-known model, or None.

    Only the last part of the name counts, because other repositories mirror a model under its name.
    """
    if name == "tiny":
        return TINY_FOLDER
    folders = {path.name.lower(): path for path in _CONFIG_FOLDER.iterdir()}
    return folders.get(name.rsplit("/", 1)[-1].lower())


def _synthetic(model: ModelConfig) -> ModelSource:
    """Return a source that has only an architecture.

    The architectures of well-known models are shipped and need no network.
    """
    folder = None if os.path.isdir(model.name_or_path) else shipped_folder(model.name_or_path)
    if folder is None:
        folder = resolve_source(replace(model, source="pretrained"), weights=False).path
    else:
        _refuse_revision(model)
    return ModelSource(model.name_or_path, folder, "synthetic")


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read config.json of `folder`.

    Raises:
        UserError: The file is missing or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: is an adapter, and no model; name its run, or name its base and set "
                f"adapter.init_from={folder}."
            )
        # Tools such as AutoRound, and the cache of the hub, have the model in a folder below.
        below = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
        hint = f" Did you mean {below[0].parent}?" if below else ""
        raise UserError(
            f"{folder}: contains no config.json, so it is not a Hugging Face model.{hint}"
        )
    try:
        config_json = load_json(path)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    if not isinstance(config_json, dict):
        raise UserError(f"{path}: must contain a JSON object.")
    return config_json


def _from_folder(name: str, folder: Path) -> ModelSource:
    """Return the source in `folder`, which is a run's directory or a model's folder."""
    for path in folder.iterdir():
        # Reading a pipe or a device would wait, or fill the memory, without end.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder; remove it from the model.")
    run, packed_of = RunLayout(folder), RunLayout(folder.resolve().parent)
    advice = "Restore it, or run its command again."
    if packed_of.quantized == folder.resolve():
        check_results(packed_of, advice, TRAINED_RESULTS[:1])
    if run.has_quantized:
        check_results(run, advice, TRAINED_RESULTS)
        adapter = run.adapter if run.has_adapter else None
        lacks_adapter = adapter is None and run.read_task() == "finetune"
        return ModelSource(name, run.quantized, "quantized", adapter, lacks_adapter)
    if run.status_json.is_file() and not (folder / "config.json").is_file():
        if run.export.is_dir():
            adapter = run.export / "adapter"
            with_adapter = f" adapter.init_from={adapter}" if adapter.is_dir() else ""
            raise UserError(
                f"model.name_or_path={name}: the run of an export; name the export: "
                f"model.name_or_path={run.export}{with_adapter}."
            )
        if run.has_adapter and (base := _full_precision_base(run)):
            check_results(run, advice, TRAINED_RESULTS)
            return replace(resolve_source(base), adapter=run.adapter)
        raise UserError(
            f"model.name_or_path={name}: a run without quantized/; it is unfinished, or "
            "was started with quant.save=false. Finish it, or name the original model, with the "
            f"settings of the run and adapter.init_from={run.adapter}."
        )
    return _from_model_folder(name, folder)


def _full_precision_base(run: RunLayout) -> ModelConfig | None:
    """Return the model that `run` has trained if its `quant.nbits` is null; None if it is not."""
    saved = read_yaml(run.config_yaml)
    quant, model = (saved.get(key) for key in ("quant", "model"))
    if not isinstance(quant, dict) or not isinstance(model, dict):
        return None
    if "nbits" not in quant or quant["nbits"] is not None:
        return None
    known = {key: model[key] for key in ("name_or_path", "revision", "source") if key in model}
    if MASK in str(known):
        raise UserError(
            f"{run.config_yaml}: model.name_or_path contains a secret, which the file hides; name "
            f"the model in model.name_or_path, and set adapter.init_from={run.adapter}."
        )
    return ModelConfig(**known)


def _from_model_folder(name: str, folder: Path) -> ModelSource:
    """Return the source in `folder`, whose weights hqqtrain, another program or none quantized."""
    method = quantized_by(folder)
    if method == "gguf":
        return _from_gguf(name, folder)
    quantization = read_config_json(folder).get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise UserError(
            f"model.name_or_path={name}: quantization_config={quantization!r} in its config.json "
            "must be an object; remove it if the weights have full precision."
        )
    if method is None or method == OWN_METHOD:
        return ModelSource(name, folder, "quantized" if method else "dense")
    if method not in FOREIGN_METHODS:
        raise UserError(
            f"model.name_or_path={name}: its weights are already quantized ({method}); give the "
            "full-precision model it was made from. Weights that can be taken over are those of "
            f"{', '.join(FOREIGN_METHODS)} (docs/import.md)."
        )
    converted = converted_folder(folder, read_config_json(folder))
    original = folder if converted else None
    return ModelSource(name, converted or folder, "quantized", foreign=method, original=original)


def _from_gguf(name: str, path: Path) -> ModelSource:
    """Return the source of a GGUF file, or of the only one in a folder."""
    file = the_gguf_file(path)
    prepared = prepared_folder(file)
    original = None if any(prepared.glob("tokenizer*")) else file.parent
    return ModelSource(
        name, prepared, "quantized", foreign="gguf", original=original, weights_file=file
    )


def read_quantization_config(folder: Path) -> dict[str, Any]:
    """Return the `quantization_config` in config.json of `folder`; an empty one if there is none.

    Old tools of GPTQ wrote it into a file of its own.

    Raises:
        UserError: config.json is missing or not a JSON object.
    """
    config = read_config_json(folder).get("quantization_config")
    return config or read_json(folder / GPTQ_CONFIG)


def _refuse_revision(model: ModelConfig) -> None:
    if model.revision is not None:
        raise UserError(
            f"model.revision={model.revision}: model.name_or_path={model.name_or_path} is "
            "a folder or shipped with hqqtrain, and has no revisions; set model.revision=null."
        )


def _is_path(name: str) -> bool:
    """Whether `name` can only be a path: hub names are `name` or `owner/name`."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return True
    return "/" in name and os.path.isdir(Path(name).parent)
