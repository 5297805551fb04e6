"""Turn a plan into a loaded model, and a loaded model into one that can be called.

`build_model` shards, reads and quantizes, with the same code for one process and for many. Its
result can be saved; `wrap_for_execution` makes it callable.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.common.reading import load_json
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.distributed.bit_exactness import check_bit_exactness
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import full_tensor
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.strategies.base import Strategy
from hqqtrain.formats.fingerprint import Fingerprint
from hqqtrain.formats.packed import cast_to_source_dtype, model_tensors, save_quantized
from hqqtrain.formats.quantized_settings import QuantizedSettings, read_quantized_settings
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.initial_adapter import initialize_adapters
from hqqtrain.loading.load import load_model
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.loading.stats import LoadStats
from hqqtrain.models.build import build_meta
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.synthetic import open_weight_source

QUANTIZATION_ERRORS = "errors.json"
"""File of a folder of packed weights with the quantization errors, which need the dense weights."""


@dataclass(frozen=True)
class LoadedModel:
    """A model whose weights are loaded. It can be gathered and saved.

    All attributes except the shards of `model` are the same on every rank.

    Attributes:
        plan: The plan that the model was built from.
        model: The model, sharded as the strategy needs it. `wrap_for_execution` makes it callable.
        settings: The settings of its quantized layers, and their fingerprint.
        layer_errors: Relative quantization error by layer. Empty if the weights were packed already
            and their folder does not record the errors.
        relative_error: Relative error over all layers; None in the same case.
        load_stats: Loading statistics by rank.
    """

    plan: ModelPlan
    model: nn.Module
    settings: QuantizedSettings
    layer_errors: dict[str, float]
    relative_error: float | None
    load_stats: list[LoadStats]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that all ranks together have read."""
        return sum(stats.bytes_read for stats in self.load_stats)

    @property
    def seconds(self) -> float:
        """Loading time of the slowest rank."""
        return max(stats.seconds for stats in self.load_stats)

    def save_packed(
        self, folder: Path, comm: Communicator, *, extra_json: Mapping[str, Any]
    ) -> None:
        """Write the packed weights and their quantization errors. Collective.

        Every rank writes a part of the files, and the folder appears complete or not at all.

        Args:
            folder: A folder like `quantized/` of a run.
            comm: All ranks of the run.
            extra_json: Contents of further JSON files, by name.
        """
        errors = {"layers": self.layer_errors, "all": self.relative_error}
        tensors = model_tensors(self.model, gather=full_tensor)
        save_quantized(
            cast_to_source_dtype(tensors, self.plan.source_dtype),
            folder,
            hf_config=self.plan.hf_config,
            settings=self.settings,
            source=self.plan.source.tokenizer,
            comm=comm,
            extra_json={QUANTIZATION_ERRORS: errors, **extra_json},
        )


@dataclass(frozen=True)
class RunnableModel:
    """A model that can be called. Only the parameters of its adapters can be gathered.

    Attributes:
        plan: The plan that the model was built from.
        model: The model, wrapped by the strategy.
        settings: The settings of its quantized layers, and their fingerprint.
    """

    plan: ModelPlan
    model: nn.Module
    settings: QuantizedSettings

    def without_adapter(self) -> AbstractContextManager:
        """Return a context in which the model computes what it does before any training.

        A fresh adapter does not change the output, so it stays enabled.
        """
        return nullcontext() if self.plan.initial_adapter is None else self.adapter_disabled()

    def adapter_disabled(self) -> AbstractContextManager:
        """Return a context in which the model is the quantized one alone."""
        if isinstance(self.model, PeftModel):
            return self.model.disable_adapter()
        return nullcontext()


class WithoutAdapter(nn.Module):
    """The base of a model that has an adapter, to call it while the adapter stays enabled.

    It shares all weights with the model, and also the switch between training and evaluation.
    """

    def __init__(self, runnable: RunnableModel) -> None:
        super().__init__()
        self.model = runnable.model
        self._adapter_disabled = runnable.adapter_disabled

    def forward(self, **inputs: Any) -> Any:
        """Return what the model returns without its adapter."""
        with self._adapter_disabled():
            return self.model(**inputs)


def build_model(
    plan: ModelPlan,
    strategy: Strategy,
    adapter: AdapterConfig,
    seed: int,
    *,
    packed: Path | None = None,
    calibration: Calibration | None = None,
    on_layer: Callable[[str], object] = lambda _: None,
) -> LoadedModel:
    """Shard, materialize and load the model of the plan. Collective.

    Args:
        plan: The plan; its `model` becomes the loaded one.
        strategy: How the model is sharded, and over which ranks.
        adapter: Settings of the initial values of fresh adapters.
        seed: Seed of the initial values of fresh adapters.
        packed: A folder like `quantized/` with the result of an earlier quantization of the same
            plan. It is read in place of the dense weights.
        calibration: The text that solvers calibrate with; None: they do without.
        on_layer: Called with the name of each quantized layer when it is loaded.

    Raises:
        UserError: A weight has NaN or Inf, the packed weights were altered, or the adapter belongs
            to another base.
    """
    model, comm = plan.model, strategy.comm
    check_bit_exactness(strategy)
    # Shard while the model is on meta, so that no rank ever allocates the full model.
    strategy.shard(model)
    source, reader = plan.source, plan.reader
    if packed:
        source = replace(source, path=packed, kind="quantized", foreign=None)
        reader = open_weight_source(source, model, comm.device)
    # Each rank hashes the rows of linear layers that it quantizes or reads, and
    # `_fingerprinted_settings` adds the hashes of all ranks.
    fingerprint, is_packed = Fingerprint(), source.kind == "quantized"
    result = load_model(
        model,
        reader,
        comm,
        quantized=is_packed,
        calibration=None if is_packed else calibration,
        on_host=strategy.host_parameters(model),
        on_rows=fingerprint.update,
        on_layer=on_layer,
    )
    settings = _fingerprinted_settings(model, source, fingerprint, comm)
    if plan.lora is not None:
        initialize_adapters(
            model, plan.initial_adapter, settings.fingerprint, adapter, seed, reader
        )
    if is_packed:
        layer_errors, relative_error = read_quantization_errors(packed)
    else:
        layer_errors, relative_error = result.relative_errors(comm)
    load_stats = comm.all_gather_object(result.stats)
    return LoadedModel(plan, model, settings, layer_errors, relative_error, load_stats)


def read_quantization_errors(folder: Path | None) -> tuple[dict[str, float], float | None]:
    """Return the relative errors (by layer, over all layers) that `folder` records.

    Return ({}, None) if it does not record them.
    """
    if folder is None or not (folder / QUANTIZATION_ERRORS).is_file():
        return {}, None
    try:
        errors = load_json(folder / QUANTIZATION_ERRORS)
        return errors["layers"], errors["all"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / QUANTIZATION_ERRORS}: cannot be read ({error!r}).") from error


def wrap_for_execution(loaded: LoadedModel, strategy: Strategy) -> RunnableModel:
    """Wrap a loaded model so that it can be called; see `Strategy.wrap`. Collective.

    `loaded` cannot be saved afterwards, because the strategy may shard its parameters differently.
    """
    return RunnableModel(loaded.plan, strategy.wrap(loaded.model), loaded.settings)


def build_reference(
    plan: ModelPlan, strategy: Strategy, dtype: torch.dtype, preemption: PreemptionHandler
) -> tuple[nn.Module, int]:
    """Return the full-precision model, sharded like the trained one, and bytes read. Collective.

    The bytes are the sum over all ranks.

    Args:
        plan: The plan of the trained model.
        strategy: How the model is sharded, and over which ranks.
        dtype: Dtype of the weights.
        preemption: Knows whether this rank was asked to stop; checked after every layer.
    """
    comm = strategy.comm
    model = build_meta(plan.hf_config, dtype).requires_grad_(False)
    # Names are matched before sharding, which changes the classes of the modules.
    reader = open_weight_source(plan.source, model, comm.device)
    strategy.shard(model)
    load_model(
        model,
        reader,
        comm,
        on_host=strategy.host_parameters(model),
        on_layer=lambda _: preemption.check_local(),
    )
    return strategy.wrap(model).eval(), int(comm.all_reduce_sum([reader.bytes_read])[0])


def _fingerprinted_settings(
    model: nn.Module, source: ModelSource, fingerprint: Fingerprint, comm: Communicator
) -> QuantizedSettings:
    """Return the quantization settings of the model with the fingerprint over all ranks.

    Raises:
        UserError: Packed weights do not have the fingerprint in their config.json.
    """
    merged = Fingerprint()
    for rank_total in comm.all_gather_object(fingerprint.total):
        merged.merge(rank_total)
    settings = QuantizedSettings.from_model(model)
    settings = replace(settings, fingerprint=merged.hexdigest(settings.by_module()))
    if source.kind == "quantized" and not source.foreign:
        recorded = read_quantized_settings(source.path).fingerprint
        if settings.fingerprint != recorded:
            raise UserError(
                f"{source.path}: its packed weights are {settings.fingerprint}, but "
                f"config.json was written for {recorded}: a file was altered, or written by "
                "another version of hqqtrain. Quantize again."
            )
    return settings
