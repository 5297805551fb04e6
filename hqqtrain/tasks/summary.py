"""The final results of a run: the content of summary.json and the table on the console."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from typing import Any

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.local import global_numel
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.model_builder import LoadedModel
from hqqtrain.models.fqn import base_tensors, is_adapter, is_packed
from hqqtrain.nn.base_linears import base_linears
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.error import storage_bits
from hqqtrain.rundir.identity import package_versions
from hqqtrain.rundir.schema import (
    MODEL_NAMES,
    DataMetrics,
    EvalMetrics,
    ExportMetrics,
    ModelMetrics,
    QuantizeMetrics,
    RunInfo,
    Summary,
    TrainMetrics,
)
from hqqtrain.tracking.console import ResultRow
from hqqtrain.training.best_evaluation import BestEvaluation
from hqqtrain.training.state import TrainState

GIB = 2**30


class RunSummary:
    """The summary, filled part by part during the run.

    Attributes:
        content: The content of summary.json so far; a part that was not run is None.
    """

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self._runtime = runtime
        self._protocol = config.eval_protocol()
        self.content = Summary(
            run=RunInfo(
                name=config.run_name(),
                recipe=config.recipe or "",
                task=config.task,
                strategy=runtime.strategy.name,
                world_size=runtime.comm.size,
                device=runtime.device_name,
                versions=package_versions(),
            )
        )
        self._rows = {key: ResultRow(name) for key, name in MODEL_NAMES.items()}
        self._adapter_numel = 0

    def add_quantization(self, loaded: LoadedModel, text: Calibration | None = None) -> None:
        """Add settings, size and cost of a model, and its calibration `text`, if any. Collective.

        The relative error is absent if the weights were packed already.
        """
        layers = base_linears(loaded.model)
        weight_count = sum(layer.out_features * layer.in_features for layer in layers.values())
        packed = [layer for layer in layers.values() if isinstance(layer, HQQLinear)]
        packed_bytes = sum(storage_bits(m.layout, m.spec.meta_dtype) for m in packed) // 8
        bits_per_weight = 8 * packed_bytes / weight_count if packed else loaded.plan.source_bits
        quantization = QuantizeMetrics(
            **_most_common_settings(loaded),
            calibration=mask_secrets(text.source) if text else None,
            calibration_tokens=text.sequences.numel() if text else None,
            bits_per_weight=bits_per_weight,
            seconds=loaded.seconds,
            weights=weight_count,
            source_bytes=loaded.plan.reader.total_bytes,
            bytes_read=loaded.bytes_read,
            peak_memory_gib=self._runtime.peak_memory_gib(),
            fingerprint=loaded.settings.fingerprint,
            relative_error=loaded.relative_error,
        )
        self.content = replace(self.content, quantize=quantization)
        self._add_sizes(loaded, packed_bytes, bits_per_weight)
        self._adapter_numel = sum(
            global_numel(param)
            for name, param in loaded.model.named_parameters()
            if is_adapter(name)
        )

    def add_evaluation(self, dataset: str, model_key: str, result: EvalResult) -> None:
        """Add an evaluation, and that of the full-precision reference model if there is one.

        Args:
            dataset: Name of the held-out set.
            model_key: The evaluated model, a key of `MODEL_NAMES`.
            result: The metrics of that model and of the reference.
        """
        evaluation = replace(
            self.content.eval or EvalMetrics(),
            dataset=mask_secrets(dataset),
            tokens=result.tokens,
            **self._protocol,
        )
        models: dict[str, Any] = {
            model_key: ModelMetrics(result.perplexity, result.kl, result.top1_agreement)
        }
        if model_key == "final":
            self._set_adapted_size(self._adapter_numel)
        figures = {"kl": result.kl, "top1_agreement": result.top1_agreement}
        self._set_row(model_key, perplexity=result.perplexity, **figures)
        if result.reference_perplexity is not None:
            known = evaluation.full_precision or ModelMetrics()  # it may have figures of a harness
            models["full_precision"] = replace(known, perplexity=result.reference_perplexity)
            # The KL divergence of the reference to itself is 0.
            self._set_row("full_precision", perplexity=result.reference_perplexity, kl=0.0)
        self.content = replace(self.content, eval=replace(evaluation, **models))

    def add_harness(self, model_key: str, figures: dict[str, dict[str, float]]) -> None:
        """Add figures of `eval.harness` to a model that was evaluated."""
        assert self.content.eval is not None
        evaluation = self.content.eval.with_harness(model_key, figures)
        self.content = replace(self.content, eval=evaluation)

    def add_reference_bytes(self, bytes_read: int) -> None:
        """Add the weight bytes read for the full-precision reference model.

        They are not a part of the bytes read for the model itself.
        """
        evaluation = replace(self.content.eval or EvalMetrics(), bytes_read=bytes_read)
        self.content = replace(self.content, eval=evaluation)

    def add_training(self, state: TrainState, trainable_count: int) -> None:
        """Add the results of the training. Collective.

        Args:
            state: Steps, tokens, seconds and loss.
            trainable_count: Number of trainable parameters over all ranks.
        """
        training = TrainMetrics(
            steps=state.steps,
            tokens=state.tokens,
            seconds=state.seconds,
            tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
            peak_memory_gib=self._runtime.peak_memory_gib(),
            trainable_parameters=trainable_count,
            loss=state.loss,
        )
        self.content = replace(self.content, train=training)
        self._adapter_numel = trainable_count
        self._set_adapted_size(trainable_count)
        self._set_row("final", seconds=state.seconds)

    def add_best(
        self,
        best: BestEvaluation,
        checkpoint: str | None,
        adapter_step: int,
        stopped_early: str | None,
    ) -> None:
        """Add the best evaluation to the results of the training, which must be there already.

        Args:
            best: The best evaluation.
            checkpoint: The folder of its checkpoint in the run directory, if that was kept.
            adapter_step: The step of the adapter that is the result.
            stopped_early: Why the training has stopped before its last step, if it has.
        """
        assert self.content.train is not None
        training = replace(
            self.content.train,
            best_step=best.step,
            best_eval_loss=best.loss,
            best_checkpoint=checkpoint,
            adapter_step=adapter_step,
            stopped_early=stopped_early,
        )
        self.content = replace(self.content, train=training)

    def add_export(self, metrics: ExportMetrics) -> None:
        """Add what was exported."""
        self.content = replace(self.content, export=metrics)
        shown = metrics.dtype if metrics.format == "dense" else metrics.format
        what = {"merge": ", adapter merged", "separate": ", adapter separate"}
        name = f"export ({shown}{what.get(metrics.adapter_form or '', '')})"
        gib = (metrics.bytes or 0) / GIB
        self._rows["export"] = ResultRow(
            name, kl=metrics.kl, bits_per_weight=metrics.bits_per_weight, gib=gib
        )

    def add_data(self, metrics: DataMetrics) -> None:
        """Add the figures of the data."""
        self.content = replace(self.content, data=metrics)

    @property
    def has_data_page(self) -> bool:
        """Whether the run has shown its data, on a page that replaces report/index.html."""
        return self.content.data is not None

    @property
    def is_packed_export(self) -> bool:
        """Whether the run has only exported weights that were quantized before."""
        quantize, export = self.content.quantize, self.content.export
        return export is not None and quantize is not None and quantize.relative_error is None

    def state_dict(self) -> dict[str, Any]:
        """Return the content and the table rows so far, as JSON values."""
        return {
            "parts": self.content.to_json(),
            "rows": {key: asdict(row) for key, row in self._rows.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the quantization, the evaluations and the table from a checkpoint."""
        saved = _with_nonfinite_kl(Summary.from_json(state["parts"]), state["parts"])
        self.content = replace(
            self.content,
            quantize=saved.quantize or self.content.quantize,
            eval=saved.eval or self.content.eval,
        )
        self._rows = {key: ResultRow(**row) for key, row in state["rows"].items()}

    def table_rows(self) -> list[ResultRow]:
        """Return the rows of the final table that have a value in addition to their name."""
        return [row for row in self._rows.values() if any(v is not None for v in astuple(row)[1:])]

    def _add_sizes(self, loaded: LoadedModel, packed_bytes: int, bits_per_weight: float) -> None:
        """Add the sizes of the model, dense and quantized if it is, to the table.

        Args:
            loaded: The loaded model.
            packed_bytes: Bytes of the packed weights, scales and zeros.
            bits_per_weight: Stored bits per quantized weight.
        """
        plan = loaded.plan
        dense_bytes = sum(
            tensor.numel() * tensor.element_size()
            for _, module, leaf, tensor in base_tensors(loaded.model)
            if not is_packed(module, leaf)
        )
        if not plan.is_packed:
            gib = plan.reader.total_bytes / GIB
            self._set_row("full_precision", bits_per_weight=plan.source_bits, gib=gib)
        if packed_bytes:
            seconds = None if plan.is_packed else loaded.seconds
            gib = (dense_bytes + packed_bytes) / GIB
            self._set_row("quantized", bits_per_weight=bits_per_weight, gib=gib, seconds=seconds)

    def _set_adapted_size(self, adapter_numel: int) -> None:
        """Add the size of the base with an adapter, which is counted as fp32."""
        base = self._rows["quantized" if self._rows["quantized"].gib else "full_precision"]
        gib = (base.gib or 0) + 4 * adapter_numel / GIB
        self._set_row("final", bits_per_weight=base.bits_per_weight, gib=gib)

    def _set_row(self, model_key: str, **values: Any) -> None:
        self._rows[model_key] = replace(self._rows[model_key], **values)


def _with_nonfinite_kl(summary: Summary, saved: Mapping[str, Any]) -> Summary:
    """Return `summary` with NaN for every `kl` that is null in the JSON values `saved`.

    JSON has no NaN, so a `kl` that was not finite is saved as null. A `kl` that was not measured is
    absent. `Summary.from_json` returns None for both.
    """
    if summary.eval is None:
        return summary
    models: dict[str, Any] = {
        key: replace(metrics, kl=math.nan)
        for key, metrics in summary.measured_models().items()
        if metrics.kl is None and "kl" in saved["eval"][key]
    }
    return replace(summary, eval=replace(summary.eval, **models))


def _most_common_settings(loaded: LoadedModel) -> dict[str, Any]:
    """Return the quantization settings that most layers have; none if nothing is quantized."""
    if not loaded.settings.modules:
        return {}
    keys = ("nbits", "group_size", "axis", "solver")
    by_layer = [
        tuple(getattr(settings, key) for key in keys)
        for settings in loaded.settings.modules.values()
    ]
    [(values, _)] = Counter(by_layer).most_common(1)
    return dict(zip(keys, values, strict=True))
