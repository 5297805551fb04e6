"""The configuration of one run, its checks, and the run name that is derived from it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields

from hqqtrain.config.errors import UserError
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
from hqqtrain.config.keys import faults, key
from hqqtrain.config.running import CkptConfig, LaunchConfig, RunSection, TrackConfig

TASKS = {
    "finetune": "quantize, train an adapter, evaluate and save",
    "quantize": "quantize, evaluate and save quantized/",
    "eval": "evaluate a model, a run or a quantized/, with or without an adapter",
    "export": "write a dense Hugging Face checkpoint: weights dequantized, adapter merged",
}
NOT_THE_RESULT = ("run", "track", "ckpt", "launch", "recipe")
"""Groups that the result does not depend on; they do not enter a run's name."""
_KEYS_NOT_THE_RESULT = {"quant": ("cache_dir",)}
"""Single keys of other groups that the result does not depend on."""
MAY_CHANGE = frozenset([
    "train.max_steps", "train.epochs", "train.micro_batch_size", "train.checkpointing",
    "train.on_nonfinite", "eval.every", "quant.backend", "quant.cache_dir", "quant.save",
    "parallel.strategy", "parallel.hybrid", "parallel.offload", "parallel.check_every",
])  # fmt: skip
"""Keys that may change when a run of the same `run.name` is resumed."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The whole configuration of one command.

    `groups.py` and `running.py` declare the keys of each group.
    """

    recipe: str | None = key(None, "recipe file, without .yaml")
    task: str = key("finetune", "what to do", choices=tuple(TASKS))
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    ckpt: CkptConfig = field(default_factory=CkptConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run: RunSection = field(default_factory=RunSection)

    def check(self) -> None:
        """Check every key and every combination of keys.

        Raises:
            UserError: with one line for every error, all at once.
        """
        found = [text.removeprefix(".") for text in faults("", self)]
        for item in fields(self):
            group = getattr(self, item.name)
            if hasattr(group, "__dataclass_fields__"):
                found += faults(item.name, group)
                found += group.faults() if hasattr(group, "faults") else ()
        found += [*self._contradictions(), *self._checkpoint_contradictions()]
        if found:
            raise UserError("\n".join(found))

    def _contradictions(self) -> Iterator[str]:
        if self.task == "finetune" and self.adapter.kind == "none":
            yield "adapter.kind=none: task=finetune trains an adapter; use lora or rslora."
        if self.task == "quantize" and not self.quant.save:
            yield "quant.save=false: task=quantize only serves to save quantized/; use true."
        if self.parallel.offloads_activations and not self.train.checkpointing:
            yield (
                f"parallel.offload={self.parallel.offload}: offloads the activations that only "
                "train.checkpointing=true keeps; use both."
            )
        if self.parallel.offloads_parameters and self.optim.name.startswith("paged"):
            yield (
                f"parallel.offload={self.parallel.offload}: the optimizer state is in host memory, "
                f"where optim.name={self.optim.name} has nothing to page; use adamw."
            )
        if self.adapter.dtype == "bf16" and self.train.precision == "fp16":
            yield (
                "adapter.dtype=bf16: the loss scaling of train.precision=fp16 cannot unscale bf16 "
                "gradients; use train.precision=bf16 or adapter.dtype=fp32."
            )
        if self.train.max_grad_norm == 0:
            yield "train.max_grad_norm=0: must be above 0, or null for no clipping."
        if not 0 <= self.adapter.dropout < 1:
            yield f"adapter.dropout={self.adapter.dropout}: must be below 1."
        if self.task == "eval" and self.eval.source is None:
            yield "eval.source=null: task=eval needs a text to evaluate on; name one."

    def _checkpoint_contradictions(self) -> Iterator[str]:
        if self.ckpt.keep_best and (self.eval.every is None or self.eval.source is None):
            yield (
                f"ckpt.keep_best={self.ckpt.keep_best}: the best checkpoints are those with the "
                "lowest eval/loss; set eval.every and eval.source, or keep_best=0."
            )
        if self.run.resume == "must" and self.task != "finetune":
            yield f"run.resume=must: task={self.task} makes no checkpoints; use auto."
        if self.train.on_nonfinite == "rollback" and self.ckpt.every is None:
            yield "train.on_nonfinite=rollback: needs checkpoints to return to; set ckpt.every."

    def run_name(self) -> str:
        """Return `run.name`, or by default the recipe (or task) and a short hash of `identity`."""
        if self.run.name:
            return self.run.name
        return f"{self.recipe or self.task}-{self.identity()[:8]}"

    def identity(self) -> str:
        """Return the sha256, in hex, of all keys that define the result."""
        keys = {k: v for k, v in asdict(self).items() if k not in NOT_THE_RESULT}
        for group, names in _KEYS_NOT_THE_RESULT.items():
            keys[group] = {k: v for k, v in keys[group].items() if k not in names}
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
