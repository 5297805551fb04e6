"""The JSON files that a run writes, as dataclasses that the writer and all readers share.

summary.json has schema 1. A part that the task does not run is absent, and so is a metric that was
not measured. Reading is lenient: from a file of another release, the known keys are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from hqqtrain.common.reading import read_json

SCHEMA = 1
"""Version of summary.json."""

MODEL_NAMES = {"full_precision": "full precision", "quantized": "quantized", "final": "trained"}
"""The models that a run measures: the key in summary.json -> the name that people read."""

GLOBAL_STEP = "train/global_step"
"""The metric that counts optimizer steps."""

LAYER_ERROR_PREFIX = "quant/relative_error/"
"""Prefix of the one metric that is logged for each module."""

TASK_FACTS = ("n_shot", "version", "documents")
"""Figures of a task of `eval.harness` that are no metrics."""

STATES = ("running", "done", "preempted", "failed")
"""Allowed values of `status` in status.json."""


@dataclass(frozen=True)
class JsonObject:
    """A JSON object with known keys.

    A key whose value is None is left out of the file, unless the field has the metadata `null`. A
    field that is a `JsonObject` itself has its class as the metadata `part`.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the object as JSON's types."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None or item.metadata.get("null"):
                values[item.name] = value.to_json() if isinstance(value, JsonObject) else value
        return values

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return the object with the known keys of `values`.

        A key that is absent, or whose value has another type, becomes None.
        """
        values = values if isinstance(values, Mapping) else {}
        arguments, hints = {}, get_type_hints(cls)
        for item in fields(cls):
            value, part = values.get(item.name), item.metadata.get("part")
            if part and value is not None:
                arguments[item.name] = part.from_json(value)
            else:
                arguments[item.name] = value if _has_type(value, hints[item.name]) else None
        return cls(**arguments)


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type of a field, such as `float | None`."""
    if isinstance(hint, UnionType):
        return any(_has_type(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


@dataclass(frozen=True)
class Status(JsonObject):
    """status.json. `status` is one of STATES; `time` is ISO 8601.

    `results` and `result_bytes` have the digests and sizes of the results of a run that is done,
    see `hqqtrain.rundir.results`.
    """

    status: str | None = None
    exit_code: int | None = field(default=None, metadata={"null": True})
    cause: str | None = None
    pid: int | None = None
    slurm_job: str | None = field(default=None, metadata={"null": True})
    time: str | None = None
    results: dict[str, str] | None = None
    result_bytes: dict[str, int] | None = None


@dataclass(frozen=True)
class RunInfo(JsonObject):
    """The `run` part of summary.json."""

    name: str | None = None
    recipe: str | None = None
    task: str | None = None
    strategy: str | None = None
    world_size: int | None = None
    device: str | None = None
    versions: dict[str, str] | None = None


@dataclass(frozen=True)
class QuantizeMetrics(JsonObject):
    """The `quantize` part: the settings that most layers have, and metrics over all layers.

    `bits_per_weight` counts codes, scales and zeros. `weights` is a number of weights. `bytes_read`
    is summed over ranks. `relative_error` is ||W - W'||^2 / ||W||^2, absent if the weights were
    packed already. With `quant.nbits=null`, `nbits` is null, the bits per weight are those of the
    source, and the error is 0. `calibration` names the source of the text, and is absent without.
    """

    nbits: int | None = field(default=None, metadata={"null": True})
    group_size: int | None = field(default=None, metadata={"null": True})
    axis: int | None = None
    solver: str | None = None
    calibration: str | None = None
    calibration_tokens: int | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None
    weights: int | None = None
    source_bytes: int | None = None
    bytes_read: int | None = None
    peak_memory_gib: float | None = None
    fingerprint: str | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class ModelMetrics(JsonObject):
    """The metrics of one model. `kl` is in nats per token, against the full-precision model.

    `top1_agreement` is the share of the tokens for which this model and the full-precision one have
    the same most likely next token. `perplexity` is null if it is not finite, because JSON has no
    infinity. `harness` has the figures of each task of `eval.harness`: its metrics with their
    `_stderr`, the number of examples in a prompt (`n_shot`), the `documents` and the `version`.
    """

    perplexity: float | None = field(default=None, metadata={"null": True})
    kl: float | None = None
    top1_agreement: float | None = None
    harness: dict[str, dict[str, float]] | None = None


@dataclass(frozen=True)
class EvalMetrics(JsonObject):
    """The `eval` part. `bytes_read` counts the weight bytes of the full-precision reference.

    Figures can be compared only if they have the same `protocol`, `context` and `stride`; see
    `hqqtrain.config.eval_protocols`. `tokens` is the number of predicted tokens, and
    `harness_version` that of lm-evaluation-harness, if tasks of it were measured.
    """

    bytes_read: int | None = None
    dataset: str | None = None
    protocol: str | None = None
    context: int | None = None
    stride: int | None = None
    tokens: int | None = None
    harness_version: str | None = None
    full_precision: ModelMetrics | None = field(default=None, metadata={"part": ModelMetrics})
    quantized: ModelMetrics | None = field(default=None, metadata={"part": ModelMetrics})
    final: ModelMetrics | None = field(default=None, metadata={"part": ModelMetrics})

    def with_harness(self, model_key: str, figures: dict[str, dict[str, float]]) -> Self:
        """Return these metrics with figures of `eval.harness`; see `ModelMetrics`.

        Args:
            model_key: A key of `MODEL_NAMES`, whose model was evaluated.
            figures: The figures by task, in addition to those of other tasks.
        """
        metrics = getattr(self, model_key)
        harness = (metrics.harness or {}) | figures
        models: dict[str, Any] = {model_key: replace(metrics, harness=harness)}
        return replace(self, harness_version=version("lm_eval"), **models)


@dataclass(frozen=True)
class TrainMetrics(JsonObject):
    """The `train` part. `loss` is that of the last step, null before the first step.

    With `eval.every`, it also has the step with the lowest `eval/loss`, that loss, the folder of
    its checkpoint if that was kept, and `adapter_step`, the step of the adapter that is the result.
    `stopped_early` says why there are fewer steps than planned.
    """

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    trainable_parameters: int | None = None
    loss: float | None = field(default=None, metadata={"null": True})
    best_step: int | None = None
    best_eval_loss: float | None = None
    best_checkpoint: str | None = None
    adapter_step: int | None = None
    stopped_early: str | None = None


@dataclass(frozen=True)
class ExportMetrics(JsonObject):
    """The `export` part.

    `bytes` counts the files of weights; `adapter` says if one was merged, and `adapter_form` what
    else became of it. `exact`, `rounded` and `approximate` count layers, `max_error` is in steps of
    a group, and `kl` is the divergence to the quantized model in nats per token; see
    `hqqtrain.formats.comparison`.
    """

    format: str | None = None
    dtype: str | None = None
    bytes: int | None = None
    adapter: bool | None = None
    adapter_form: str | None = None
    bits_per_weight: float | None = None
    exact: int | None = None
    rounded: int | None = None
    approximate: int | None = None
    max_error: float | None = None
    relative_error: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class DataMetrics(JsonObject):
    """The `data` part, which task=data writes; see `hqqtrain.data.statistics.DataStatistics`.

    If there are several sources, or one that is repeated, `sources` has the fields of
    `hqqtrain.data.mixture.SourceUse` for each.
    `left_out` has the number of rows that became no example, by reason. `held_out` has the
    `examples` and `tokens` of the held-out text, and those of its tokens that are measured. Some
    values of `eval.protocol` measure `windows` of the joined examples.
    """

    source: str | None = None
    sources: list[dict[str, Any]] | None = None
    format: str | None = None
    examples: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    sequences: int | None = None
    max_seq_len: int | None = None
    padding: float | None = None
    truncated: int | None = None
    dropped: int | None = None
    split: int | None = None
    untrained: int | None = None
    duplicates: int | None = None
    lengths: dict[str, int] | None = None
    histogram: list[list[int]] | None = None
    left_out: dict[str, int] | None = None
    empty_answers: int | None = None
    held_out: dict[str, int] | None = None


@dataclass(frozen=True)
class Summary(JsonObject):
    """The content of summary.json. A part that the task did not run is None."""

    schema: int | None = SCHEMA
    run: RunInfo | None = field(default=None, metadata={"part": RunInfo})
    quantize: QuantizeMetrics | None = field(default=None, metadata={"part": QuantizeMetrics})
    eval: EvalMetrics | None = field(default=None, metadata={"part": EvalMetrics})
    train: TrainMetrics | None = field(default=None, metadata={"part": TrainMetrics})
    export: ExportMetrics | None = field(default=None, metadata={"part": ExportMetrics})
    data: DataMetrics | None = field(default=None, metadata={"part": DataMetrics})

    def measured_models(self) -> dict[str, ModelMetrics]:
        """Return the metrics of the measured models, by key and in the order of MODEL_NAMES."""
        models = {key: getattr(self.eval, key, None) for key in MODEL_NAMES}
        return {key: metrics for key, metrics in models.items() if metrics is not None}


def read_summary(path: Path) -> Summary:
    """Return the content of summary.json; an empty `Summary` if it is missing or not JSON."""
    return Summary.from_json(read_json(path))


def read_status(path: Path) -> Status:
    """Return the content of status.json; an empty `Status` if it is missing or not JSON."""
    return Status.from_json(read_json(path))
