"""Initial values of the adapters: fresh ones, seeded by name, or those of an existing adapter."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.distributed.local import copy_from_full
from hqqtrain.formats.manifest import DamagedError, check_sealed, is_sealed
from hqqtrain.formats.peft import Adapter, load_adapter
from hqqtrain.models.fqn import is_adapter, original_module, peft_key, strip_wrappers
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.base import WeightSource
from hqqtrain.nn.lora import (
    init_adapters,
    inject_adapters,
    lora_config,
    minimal_targets,
    target_linears,
)
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.results import TRAINED_RESULTS, check_results


@dataclass(frozen=True)
class InitialAdapter:
    """An existing adapter that gives the initial values.

    Attributes:
        folder: The folder of the adapter.
        adapter: Its configuration and tensors.
        origin: The beginning of messages: the folder and the setting that selected it.
    """

    folder: Path
    adapter: Adapter
    origin: str


def load_initial_adapter(
    config: AdapterConfig,
    source: ModelSource,
    resumed: Path | None,
    linears: Mapping[str, tuple[int, int]] | None = None,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
) -> InitialAdapter | None:
    """Load the adapter to start from, or return None if the run starts with fresh adapters.

    The function uses the first of these that is set: the checkpoint folder `resumed`,
    `adapter.init_from`, the adapter of the run that `model.name_or_path` names.

    Args:
        config: The group `adapter` of the configuration.
        source: The model's source.
        resumed: The folder of the checkpoint, if the run resumes.
        linears: The linear layers that the adapter must fit, see `load_adapter`.
        tensors: The tensors of the model, see `load_adapter`.

    Raises:
        UserError: The adapter cannot be read, is missing, is not plain LoRA or does not fit, or a
            sealed folder was altered.
    """
    folder = resumed or config.init_from or source.adapter
    if folder is None and source.lacks_adapter:
        raise UserError(
            f"model.name_or_path={source.name}: is a run that trains an adapter, but its adapter/ "
            f"is missing. Run its command again, which writes adapter/; or name {source.path} to "
            "use the base without adapter."
        )
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    if resumed:
        origin = (
            f"{folder}: the checkpoint that the run resumes from (another run.name starts from "
            "scratch)"
        )
    elif config.init_from:
        origin = f"adapter.init_from={folder}"
    else:
        origin = f"{folder}: the adapter of model.name_or_path={source.name}"
    if not resumed:  # the manifest of `resumed` was checked when the checkpoint was read
        _check_manifest(folder, origin)
        if (run := RunLayout(folder.resolve().parent)).adapter == folder.resolve():
            check_results(run, "Restore it, or run its command again.", TRAINED_RESULTS)
    adapter = load_adapter(folder, origin=origin, linears=linears, tensors=tensors)
    return InitialAdapter(folder, adapter, origin)


def _check_manifest(folder: Path, origin: str) -> None:
    """Refuse a sealed folder whose files were altered; otherwise nobody would notice it.

    Folders of other tools have no manifest and are not checked.
    """
    try:
        if is_sealed(folder):
            check_sealed(folder)
    except DamagedError as error:
        raise UserError(f"{origin}: {error}. Use another checkpoint of that run.") from error


def unknown_base_warning(start: InitialAdapter, source: ModelSource) -> str:
    """Return a warning if `start` does not record the base it was trained on, or ""."""
    if start.adapter.fingerprint:
        return ""  # `initialize_adapters` compares it with the fingerprint of the base
    base_name = start.adapter.config.base_model_name_or_path or "no model"
    return (
        f"{start.origin}: does not record the base it was trained on, and names "
        f"{base_name}; if that is not model.name_or_path={source.name}, the adapter adds noise."
    )


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    start: InitialAdapter | None,
    token_ids: Sequence[int] = (),
    *,
    adapts: bool,
) -> tuple[PeftModel, LoraConfig]:
    """Add an adapter to `model`, without values.

    Args:
        model: The quantized model on the meta device, changed in place.
        config: The group `adapter` of the configuration.
        start: The existing adapter, if any.
        token_ids: The ids of new tokens, whose embeddings a new adapter trains.
        adapts: Whether the adapter is that of `config`, to be trained. Otherwise it is `start`.

    Returns:
        The model with its adapter, and PEFT's configuration of the adapter.

    Raises:
        UserError: `start` has another rank, scaling or other modules than `config` asks for, or
            PEFT refuses a module.
    """
    if start:
        _refuse_tied_modules(start, model)
    if adapts:
        started = start.adapter.tokens.values() if start else ()
        ids = {*token_ids, *chain.from_iterable(started)}
        targets, lora = target_linears(config, model), lora_config(config, model, sorted(ids))
        names = config.target_modules
        shown = f"[{','.join(names)}]" if isinstance(names, list) else names
        origin = f"adapter.target_modules={shown}"
        if start:
            _continue_adapter(start, lora, targets, model)
    else:
        assert start is not None, "without a new adapter there must be an old one"
        targets, origin, lora = start.adapter.modules, start.origin, copy(start.adapter.config)
        lora.base_model_name_or_path = None  # PEFT would warn that this model has another name
    return inject_adapters(model, lora, targets, origin), lora


def _refuse_tied_modules(start: InitialAdapter, model: PreTrainedModel) -> None:
    """Refuse an adapter with a module in full whose weight is tied to another module."""
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for module in start.adapter.config.modules_to_save or ():
        if f"{module}.weight" in tied:
            raise UserError(
                f"{start.origin}: modules_to_save has {module}, whose weight is tied to another "
                "module of this model; PEFT trains a copy of one of the two. Use an adapter that "
                "was trained without it."
            )


def _continue_adapter(
    start: InitialAdapter, lora: LoraConfig, targets: Sequence[str], model: nn.Module
) -> None:
    """Check that the new adapter `lora` of `targets` is that of `start`.

    It gets the ranks and alphas of single modules, which no key of hqqtrain sets.
    """
    saved = start.adapter.config
    if saved.lora_alpha < 0:
        raise UserError(
            f"{start.origin}: was made with lora_alpha={saved.lora_alpha}, and adapter.alpha is "
            "never negative. It can be evaluated and exported, but not trained further."
        )
    kind = "rslora" if saved.use_rslora else "lora"
    fixes = {"r": f"adapter.r={saved.r}", "lora_alpha": f"adapter.alpha={saved.lora_alpha}",
             "use_rslora": f"adapter.kind={kind}"}  # fmt: skip
    errors = [
        f"{start.origin}: was made with {key}={getattr(saved, key)}, the configuration asks for "
        f"{getattr(lora, key)}. Use {fix}."
        for key, fix in fixes.items()
        if getattr(saved, key) != getattr(lora, key)
    ]
    if different := sorted(set(targets) ^ set(start.adapter.modules)):
        selects = "selects" if different[0] in targets else "does not select"
        fix = ",".join(minimal_targets(start.adapter.modules, model))
        errors.append(
            f"{start.origin}: was trained with other adapter.target_modules: the value now "
            f"{selects} {different[0]}. Use adapter.target_modules=[{fix}]."
        )
    saved_modules, modules = saved.modules_to_save or [], lora.modules_to_save or []
    if set(saved_modules) != set(modules):
        errors.append(
            f"{start.origin}: was trained with other adapter.modules_to_save. Use "
            f"adapter.modules_to_save=[{','.join(saved_modules)}]."
        )
    if errors:
        raise UserError("\n".join(errors))
    lora.rank_pattern, lora.alpha_pattern = saved.rank_pattern, saved.alpha_pattern


def initialize_adapters(
    model: nn.Module,
    start: InitialAdapter | None,
    fingerprint: str,
    config: AdapterConfig,
    seed: int,
    reader: WeightSource | None = None,
) -> None:
    """Write the initial values of every adapter in `model`, sharded or not.

    Args:
        model: The model, with its adapters.
        start: The existing adapter, if any. Without one, `adapter.init` gives the values.
        fingerprint: Fingerprint of the base in `model`.
        config: Settings of the adapters.
        seed: Seed of fresh values, `train.seed`.
        reader: The weights of the base; needed if parts of it are trained.

    Raises:
        UserError: `start` was trained on another base.
    """
    init_adapters(model, seed, config.init, write=copy_from_full)
    if start is not None:
        start.adapter.check_base(fingerprint, start.origin)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and reader is not None:
            for attribute, param in module.modules_to_save["default"].named_parameters():
                values = reader.read(f"{strip_wrappers(name)}.{attribute}")
                copy_from_full(param, _base_values(param, values, module))
        elif isinstance(module, TrainableTokensWrapper) and reader is not None:
            _initialize_tokens(module.token_adapter, strip_wrappers(name), start, reader)
    if start is None:
        return
    for name, param in model.named_parameters():
        if is_adapter(name) and "trainable_tokens_delta" not in name:
            copy_from_full(param, start.adapter.state[peft_key(name)])


def _initialize_tokens(
    layer: TrainableTokensLayer, name: str, start: InitialAdapter | None, reader: WeightSource
) -> None:
    """Write the rows of the module `name` that are trained: those of `start`, or of the base."""
    if layer.tied_adapter:  # its rows are those of another module
        return
    ids, param = layer.token_indices["default"], layer.trainable_tokens_delta["default"]
    rows = _base_values(param, reader.read(f"{name}.weight", [slice(i, i + 1) for i in ids]), layer)
    layer.trainable_tokens_original["default"].copy_(rows)
    if start is not None:
        rows = _with_rows_of(start.adapter, name, ids, rows)
    copy_from_full(param, rows)


def _base_values(param: Tensor, values: Tensor, wrapper: nn.Module) -> Tensor:
    """Return values of the base in the dtype of `param`, rounded as in the base of `wrapper`."""
    base = wrapper.base_layer if isinstance(wrapper, TrainableTokensLayer) else wrapper
    dtype = next(original_module(base).parameters()).dtype
    return values.to(dtype).to(param.dtype)


def _with_rows_of(adapter: Adapter, module: str, ids: Sequence[int], rows: Tensor) -> Tensor:
    """Return the rows of the tokens `ids`, with the values of `adapter` where it has them."""
    if module not in adapter.tokens:
        return rows
    result, place = rows.clone(), {id: index for index, id in enumerate(ids)}
    for row, id in zip(adapter.token_rows(module), adapter.tokens[module], strict=True):
        result[place[id]] = row.to(result)
    return result
