"""The JSON files that a run leaves, as dataclasses: the writer and all readers share them.

summary.json has schema 1: parts that a task does not run are absent, figures that were not
measured as well. Readers are lenient: a file of another release gives the figures that are known.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

SCHEMA = 1

MODEL_NAMES = {"full_precision": "full precision", "quantized": "quantized", "final": "trained"}
"""The models that a run measures: the key in summary.json -> the name that people read."""

GLOBAL_STEP = "train/global_step"
"""The metric that counts optimizer steps."""

LAYER_ERROR_PREFIX = "quant/relative_error/"
"""Prefix of the one metric that is logged for each module."""

STATES = ("running", "done", "preempted", "failed")


@dataclass(frozen=True)
class JsonObject:
    """A JSON object with known keys; a key whose value is None is left out of the file."""

    def to_json(self) -> dict[str, Any]:
        """Return the object as JSON's types."""
        found: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None or item.metadata.get("null"):
                found[item.name] = value.to_json() if isinstance(value, JsonObject) else value
        return found

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return the known keys of `values`; None for those that are absent."""
        values = values if isinstance(values, Mapping) else {}
        found = {}
        for item in fields(cls):
            value, part = values.get(item.name), item.metadata.get("part")
            found[item.name] = part.from_json(value) if part and value is not None else value
        return cls(**found)


@dataclass(frozen=True)
class Status(JsonObject):
    """status.json. `status` is one of STATES; `time` is ISO 8601."""

    status: str | None = None
    exit_code: int | None = field(default=None, metadata={"null": True})
    cause: str | None = None
    pid: int | None = None
    slurm_job: str | None = field(default=None, metadata={"null": True})
    time: str | None = None


@dataclass(frozen=True)
class RunFacts(JsonObject):
    """The `run` part of summary.json."""

    name: str | None = None
    recipe: str | None = None
    task: str | None = None
    strategy: str | None = None
    world_size: int | None = None
    device: str | None = None
    versions: dict[str, str] | None = None


@dataclass(frozen=True)
class QuantizeFigures(JsonObject):
    """The `quantize` part: settings that most layers have, and figures over all of them.

    `bits_per_weight` counts codes, scales and zeros; `bytes_read` is summed over ranks;
    `relative_error` is ||W - W'||^2 / ||W||^2, absent where the weights came packed.
    """

    nbits: int | None = None
    group_size: int | None = field(default=None, metadata={"null": True})
    axis: int | None = None
    solver: str | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None
    weights: int | None = None
    source_bytes: int | None = None
    bytes_read: int | None = None
    peak_memory_gib: float | None = None
    fingerprint: str | None = None
    relative_error: float | None = None


@dataclass(frozen=True)
class ModelFigures(JsonObject):
    """The figures of one model; `kl` is in nats, against the full-precision model.

    `perplexity` is null if it is not finite, as JSON has no infinity.
    """

    perplexity: float | None = field(default=None, metadata={"null": True})
    kl: float | None = None


@dataclass(frozen=True)
class EvalFigures(JsonObject):
    """The `eval` part. `bytes_read`: weight bytes read for the full-precision reference."""

    bytes_read: int | None = None
    dataset: str | None = None
    tokens: int | None = None
    full_precision: ModelFigures | None = field(default=None, metadata={"part": ModelFigures})
    quantized: ModelFigures | None = field(default=None, metadata={"part": ModelFigures})
    final: ModelFigures | None = field(default=None, metadata={"part": ModelFigures})


@dataclass(frozen=True)
class TrainFigures(JsonObject):
    """The `train` part; `loss` is the last step's, null before the first step."""

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gib: float | None = None
    trainable_parameters: int | None = None
    loss: float | None = field(default=None, metadata={"null": True})


@dataclass(frozen=True)
class Summary(JsonObject):
    """summary.json; a part that the task did not run is None."""

    schema: int | None = SCHEMA
    run: RunFacts | None = field(default=None, metadata={"part": RunFacts})
    quantize: QuantizeFigures | None = field(default=None, metadata={"part": QuantizeFigures})
    eval: EvalFigures | None = field(default=None, metadata={"part": EvalFigures})
    train: TrainFigures | None = field(default=None, metadata={"part": TrainFigures})

    def measured_models(self) -> dict[str, ModelFigures]:
        """Return the models that were measured, by their key in MODEL_NAMES, in its order."""
        found = {key: getattr(self.eval, key, None) for key in MODEL_NAMES}
        return {key: figures for key, figures in found.items() if figures is not None}


def read_summary(path: Path) -> Summary:
    """Return what the file at `path` holds; empty where it is missing or not JSON."""
    return Summary.from_json(read_json(path))


def read_status(path: Path) -> Status:
    """Return what the file at `path` holds; empty where it is missing or not JSON."""
    return Status.from_json(read_json(path))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; empty where it is missing or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
