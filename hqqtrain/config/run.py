"""The whole configuration of one run, its checks, and the name it gets from what it means."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields

from hqqtrain.common.errors import UserError
from hqqtrain.config.field import field_errors, key
from hqqtrain.config.groups import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    TrainConfig,
)
from hqqtrain.config.infra import CheckpointConfig, LaunchConfig, RunDirConfig, TrackConfig
from hqqtrain.config.renamed import renamed_value_errors, with_old_names

TASKS = {
    "finetune": "quantize, adapt, train, evaluate, save",
    "quantize": "quantize, measure and write quantized/",
    "eval": "measure a model or a quantized/, with or without an adapter",
    "export": "write dense weights, dequantized and merged, as a Hugging Face checkpoint",
}

NOT_THE_RESULT = ("run", "track", "ckpt", "launch", "recipe")
"""Groups that a result does not depend on: they do not enter a run's name."""

_NOR_THESE = {"quant": ("cache_dir",)}
"""Keys of other groups that it does not depend on either."""

MAY_CHANGE = frozenset([
    "train.max_steps", "train.epochs", "train.micro_batch_size", "train.activation_checkpointing",
    "train.on_nonfinite", "eval.every", "quant.backend", "quant.cache_dir", "quant.save",
    "parallel.strategy", "parallel.hsdp", "parallel.offload", "parallel.consistency_check_every",
])  # fmt: skip
"""Keys that may differ where a run of the same `run.name` goes on."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """What one command does. Groups as in the documentation; see `groups.py` for their keys."""

    recipe: str | None = key(None, "a file of recipes/, without .yaml")
    task: str = key("finetune", "the work", choices=tuple(TASKS))
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    ckpt: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run: RunDirConfig = field(default_factory=RunDirConfig)

    def check(self) -> None:
        """Raises UserError with every fault of the configuration at once."""
        found = [text.removeprefix(".") for text in field_errors("", self)]
        for item in fields(self):
            group = getattr(self, item.name)
            if hasattr(group, "__dataclass_fields__"):
                renamed = list(renamed_value_errors(item.name, group))
                found += renamed or field_errors(item.name, group)
                found += group.faults() if hasattr(group, "faults") else ()
        found += [*self._contradictions(), *self._contradictions_of_running()]
        if found:
            raise UserError("\n".join(found))

    def _contradictions(self) -> Iterator[str]:
        if self.task == "finetune" and self.adapter.kind == "none":
            yield "adapter.kind=none: task=finetune trains an adapter; use lora or rslora."
        if self.task == "quantize" and not self.quant.save:
            yield "quant.save=false: task=quantize has nothing else to do; use true."
        if self.parallel.offloads_activations and not self.train.activation_checkpointing:
            yield (
                f"parallel.offload={self.parallel.offload}: moves the inputs that "
                "train.activation_checkpointing=true keeps; use both."
            )
        if self.parallel.offloads_parameters and self.optim.name.startswith("paged"):
            yield (
                f"parallel.offload={self.parallel.offload}: the optimizer is on the host, where "
                f"optim.name={self.optim.name} has nothing to page; use adamw."
            )
        if self.adapter.dtype == "bf16" and self.train.precision == "fp16":
            yield (
                "adapter.dtype=bf16: gradients in bf16 cannot be scaled as train.precision=fp16 "
                "does; use train.precision=bf16 or adapter.dtype=fp32."
            )
        if self.train.max_grad_norm == 0:
            yield "train.max_grad_norm=0: must be above 0, or null to clip nothing."
        if not 0 <= self.adapter.dropout < 1:
            yield f"adapter.dropout={self.adapter.dropout}: must be below 1."
        if self.task == "eval" and self.eval.source is None:
            yield "eval.source=null: task=eval needs a text to measure on."

    def _contradictions_of_running(self) -> Iterator[str]:
        if self.ckpt.keep_best and (self.eval.every is None or self.eval.source is None):
            yield (
                f"ckpt.keep_best={self.ckpt.keep_best}: the best are told by eval/loss; set "
                "eval.every and eval.source, or keep_best=0."
            )
        if self.run.resume == "must" and self.task != "finetune":
            yield f"run.resume=must: task={self.task} has no checkpoints; use auto."
        if self.train.on_nonfinite == "rollback" and self.ckpt.every is None:
            yield "train.on_nonfinite=rollback: goes back to checkpoints; set ckpt.every."

    def run_name(self) -> str:
        """`run.name`, or the recipe and a short hash of everything the result depends on."""
        if self.run.name:
            return self.run.name
        return f"{self.recipe or self.task}-{self.identity()[:8]}"

    def identity(self) -> str:
        """sha256, in hex, over the keys that define the result."""
        values = with_old_names(asdict(self))
        keys = {k: v for k, v in values.items() if k not in NOT_THE_RESULT}
        for group, names in _NOR_THESE.items():
            keys[group] = {k: v for k, v in keys[group].items() if k not in names}
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
