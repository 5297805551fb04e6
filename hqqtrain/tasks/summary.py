"""The final figures of a run: summary.json and the table on the console."""

from collections import Counter
from dataclasses import asdict, astuple, replace
from typing import Any

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.loading.model_builder import LoadedModel
from hqqtrain.models.fqn import base_tensors, is_packed
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.quant.error import storage_bits
from hqqtrain.rundir.identity import package_versions
from hqqtrain.rundir.schema import (
    MODEL_NAMES,
    EvalMetrics,
    ModelMetrics,
    QuantizeMetrics,
    RunInfo,
    Summary,
    TrainMetrics,
)
from hqqtrain.tracking.console import ResultRow
from hqqtrain.train.state import TrainState

GIB = 2**30


class RunSummary:
    """The summary, filled part by part during the run.

    Attributes:
        figures: The content of summary.json so far; parts that a task skips are None.
    """

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self._runtime = runtime
        self.figures = Summary(
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

    def add_quantization(self, loaded: LoadedModel) -> None:
        """Add the facts of the loaded model. Collective.

        The relative error is absent if the weights were packed already.
        """
        layers = [m for m in loaded.model.modules() if isinstance(m, HQQLinear)]
        weights = sum(m.out_features * m.in_features for m in layers)
        packed = sum(storage_bits(m.layout, m.spec.meta_dtype) for m in layers) // 8
        bits_per_weight = 8 * packed / weights
        figures = QuantizeMetrics(
            **_common_settings(loaded),
            bits_per_weight=bits_per_weight,
            seconds=loaded.seconds,
            weights=weights,
            source_bytes=loaded.plan.reader.total_bytes,
            bytes_read=loaded.bytes_read,
            peak_memory_gib=self._runtime.peak_memory_gib(),
            fingerprint=loaded.settings.fingerprint,
            relative_error=loaded.relative_error,
        )
        self.figures = replace(self.figures, quantize=figures)
        self._add_sizes(loaded, packed, bits_per_weight)

    def add_evaluation(self, dataset: str, part: str, measured: EvalResult) -> None:
        """Add an evaluation, and that of the full-precision reference model if there is one.

        Args:
            dataset: Name of the held-out set.
            part: `quantized` or `final`.
            measured: The figures.
        """
        figures = replace(
            self.figures.eval or EvalMetrics(),
            dataset=mask_secrets(dataset),
            tokens=measured.tokens,
        )
        model: dict[str, Any] = {part: ModelMetrics(measured.perplexity, measured.kl)}
        figures = replace(figures, **model)
        if measured.reference_perplexity is not None:
            reference = ModelMetrics(measured.reference_perplexity)
            figures = replace(figures, full_precision=reference)
            self._set_row("full_precision", perplexity=measured.reference_perplexity, kl=0.0)
        self.figures = replace(self.figures, eval=figures)
        self._set_row(part, perplexity=measured.perplexity, kl=measured.kl)

    def add_reference_bytes(self, bytes_read: int) -> None:
        """Add the weight bytes read for the full-precision reference model, counted apart."""
        figures = replace(self.figures.eval or EvalMetrics(), bytes_read=bytes_read)
        self.figures = replace(self.figures, eval=figures)

    def add_training(self, done: TrainState, trainable: int) -> None:
        """Add the figures of the training. Collective.

        Args:
            done: Steps, tokens, seconds and loss.
            trainable: Number of trainable parameters over all ranks.
        """
        figures = TrainMetrics(
            steps=done.steps,
            tokens=done.tokens,
            seconds=done.seconds,
            tokens_per_second=done.tokens / done.seconds if done.seconds else 0.0,
            peak_memory_gib=self._runtime.peak_memory_gib(),
            trainable_parameters=trainable,
            loss=done.loss,
        )
        self.figures = replace(self.figures, train=figures)
        base = self._rows["quantized"]
        self._set_row(
            "final", seconds=done.seconds, bits_per_weight=base.bits_per_weight,
            gib=(base.gib or 0) + 4 * trainable / GIB,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the parts and the table rows so far, as JSON."""
        return {
            "parts": self.figures.to_json(),
            "rows": {k: asdict(row) for k, row in self._rows.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the quantization, the evaluations and the table from a checkpoint."""
        saved = Summary.from_json(state["parts"])
        self.figures = replace(
            self.figures,
            quantize=saved.quantize or self.figures.quantize,
            eval=saved.eval or self.figures.eval,
        )
        self._rows = {name: ResultRow(**row) for name, row in state["rows"].items()}

    def table_rows(self) -> list[ResultRow]:
        """Return the rows of the final table that have a figure."""
        return [row for row in self._rows.values() if any(v is not None for v in astuple(row)[1:])]

    def _add_sizes(self, loaded: LoadedModel, packed: int, bits: float) -> None:
        """Add bits per quantized weight and GiB of the whole model, before and after.

        Args:
            loaded: The loaded model.
            packed: Bytes of the packed weights, scales and zeros.
            bits: Bits per quantized weight.
        """
        plan = loaded.plan
        dense = sum(
            tensor.numel() * tensor.element_size()
            for _, module, leaf, tensor in base_tensors(loaded.model)
            if not is_packed(module, leaf)
        )
        if not plan.is_packed:
            name = next(iter(loaded.settings.modules))
            source_bits = 8 * plan.reader.dtype(f"{name}.weight").itemsize
            gib = plan.reader.total_bytes / GIB
            self._set_row("full_precision", bits_per_weight=source_bits, gib=gib)
        seconds = None if plan.is_packed else loaded.seconds
        gib = (dense + packed) / GIB
        self._set_row("quantized", bits_per_weight=bits, gib=gib, seconds=seconds)

    def _set_row(self, part: str, **values: Any) -> None:
        self._rows[part] = replace(self._rows[part], **values)


def _common_settings(loaded: LoadedModel) -> dict[str, Any]:
    """Return the quantization settings that most layers have."""
    keys = ("nbits", "group_size", "axis", "solver")
    by_layer = [tuple(getattr(m, k) for k in keys) for m in loaded.settings.modules.values()]
    return dict(zip(keys, Counter(by_layer).most_common(1)[0][0], strict=True))
