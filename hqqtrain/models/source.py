"""What `model.name_or_path` and `model.source` mean: whose architecture, and which weights.

Decided in one place, so that quantizing, training, measuring and exporting agree on it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.config.groups import ModelConfig
from hqqtrain.models.hub import download_snapshot
from hqqtrain.rundir.layout import RunLayout

TINY_FOLDER = Path(__file__).parent / "tiny"

_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ModelSource:
    """A folder with config.json, tokenizer and safetensors, and what its tensors are.

    `kind`: `dense` weights, `quantized` by hqqtrain, or `synthetic`: then only config.json of the
    folder matters. `adapter`: the adapter that the run trained, where `name` is a run's directory
    and it has one.
    """

    name: str
    path: Path
    kind: Literal["dense", "quantized", "synthetic"]
    adapter: Path | None = None

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the bundled one where no text is meant to be understood."""
        return TINY_FOLDER if self.kind == "synthetic" else self.path


def resolve_source(model: ModelConfig, *, weights: bool = True) -> ModelSource:
    """The folder that `model` names, downloaded from the hub where it is a hub name.

    `weights=False` is enough for the configuration and the tokenizer: it spares the download
    of the weights. Raises UserError for what is missing, unreachable or in another format.
    """
    name = model.name_or_path
    if model.source == "synthetic":
        return _synthetic(model)
    folder = TINY_FOLDER if name == "tiny" else Path(name).expanduser()
    if folder.is_dir():
        _refuse_revision(model)
        return _from_folder(name, folder)
    if folder.exists():
        raise UserError(f"model.name_or_path={name}: is a file; give the folder that holds it.")
    if _is_path(name):
        siblings = [p.name for p in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, siblings)
        raise UserError(f"model.name_or_path={name}: there is no such folder.{hint}")
    return _from_folder(name, download_snapshot(name, model.revision, weights=weights))


def shipped_folder(name: str) -> Path | None:
    """The folder of this package that holds config.json of a well-known model.

    Found by the last part of the name, for repositories that mirror a model under its name.
    """
    if name == "tiny":
        return TINY_FOLDER
    known = {path.name.lower(): path for path in _CONFIGS.iterdir()}
    return known.get(name.rsplit("/", 1)[-1].lower())


def _synthetic(model: ModelConfig) -> ModelSource:
    """The architecture alone: from this package, so that no network is needed, or as otherwise."""
    shipped = None if Path(model.name_or_path).is_dir() else shipped_folder(model.name_or_path)
    if shipped is None:
        shipped = resolve_source(replace(model, source="pretrained"), weights=False).path
    else:
        _refuse_revision(model)
    return ModelSource(model.name_or_path, shipped, "synthetic")


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of `folder`; UserError where it is missing or broken."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.json, so it is not a Hugging Face model.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object.")
    return found


def _from_folder(name: str, folder: Path) -> ModelSource:
    run = RunLayout(folder)
    if run.has_quantized:
        adapter = run.adapter if run.has_adapter else None
        return ModelSource(name, run.quantized, "quantized", adapter)
    if run.status_json.is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"model.name_or_path={name}: a run without quantized/; it is unfinished, or "
            "had quant.save=false."
        )
    return ModelSource(name, folder, _kind(name, read_config_json(folder)))


def _kind(name: str, config: dict[str, Any]) -> Literal["dense", "quantized"]:
    quantization = config.get("quantization_config")
    if not quantization:
        return "dense"
    method = quantization.get("quant_method")
    if method != "hqqtrain":
        raise UserError(
            f"model.name_or_path={name}: its weights are already quantized ({method}); give the "
            "full-precision model it was made from."
        )
    return "quantized"


def _refuse_revision(model: ModelConfig) -> None:
    if model.revision is not None:
        raise UserError(
            f"model.revision={model.revision}: model.name_or_path={model.name_or_path} is read "
            "from a folder, which has no revisions; set model.revision=null."
        )


def _is_path(name: str) -> bool:
    """Whether `name` can only mean a folder: hub names are `name` or `owner/name`."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return True
    return "/" in name and Path(name).parent.is_dir()
