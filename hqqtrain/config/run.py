"""The configuration of one run, its checks, and the run name that is derived from it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.config.adapter import AdapterConfig
from hqqtrain.config.conflicts import CONFIG_CONFLICTS, conflict_errors
from hqqtrain.config.export import ExportConfig
from hqqtrain.config.field import field_errors, key
from hqqtrain.config.generate import GenerateConfig
from hqqtrain.config.groups import AUTO, DataConfig, EvalConfig, OptimConfig, TrainConfig
from hqqtrain.config.hub import HubConfig
from hqqtrain.config.infra import CheckpointConfig, LaunchConfig, RunDirConfig, TrackConfig
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.config.plan import PlanConfig
from hqqtrain.config.quant import QuantConfig
from hqqtrain.config.renamed import renamed_value_errors, with_old_names

TASKS = {
    "finetune": "quantize, train an adapter, evaluate and save",
    "quantize": "quantize, report the error of every layer, and save quantized/",
    "eval": "evaluate a model, a run or a quantized/, with or without an adapter",
    "export": "write a model for other programs: dense weights with the adapter merged, or the few "
    "bits in the format of another program (export.format)",
    "data": "print what is trained: figures of the data, and samples with their trained tokens",
    "generate": "chat with a model on the terminal, or continue or answer prompts",
    "plan": "predict memory, speed and disk of a training on any machine; nothing is loaded",
}

TASKS_WITHOUT_RUN = ("generate", "plan")
"""Tasks that write no run directory."""

NON_RESULT_GROUPS = ("generate", "plan", "hub", "run", "track", "ckpt", "launch", "recipe")
"""Groups that the result does not depend on; they do not enter a run's name."""

_NON_RESULT_KEYS = {
    "quant": ("cache_dir", "offload_meta"),
    "data": ("show", "workers", "cache_dir"),
    "eval": ("cache_dir",),
    "train": ("profile",),
}
"""Single keys of other groups that the result does not depend on."""

ADDED_GROUPS: dict[str, dict[str, Any]] = {"export": asdict(ExportConfig())}
"""Groups that the first release did not have, and their defaults.

A group with its defaults does not enter the identity, so earlier runs keep theirs.
"""

ADDED_KEYS: dict[str, dict[str, Any]] = {
    "data": {
        name: getattr(DataConfig(), name)
        for name in (
            "validation",
            "file_type",
            "max_bad_rows",
            "chat_template",
            "add_tokens",
            "loss_on",
            "on_long",
            "streaming",
            "shuffle_buffer",
        )
    },
    "adapter": {"modules_to_save": []},
    "quant": {
        "offload_meta": False,
        "zero": "float",
        "calibration": None,
        "calibration_tokens": QuantConfig().calibration_tokens,
    },
    "train": {"early_stopping_patience": None, "fused": "auto", "profile": None},
    "eval": {name: getattr(EvalConfig(), name) for name in ("samples", "protocol", "harness")},
    "ckpt": {"load_best": False},
}
"""Single keys that the first release did not have, by group, and their defaults; as above."""

RESULT_KEYS = {"ckpt": ("load_best",)}
"""Single keys of `NON_RESULT_GROUPS` that the result depends on."""

CHANGEABLE_ON_RESUME = frozenset([
    "ckpt.load_best", "train.early_stopping_patience", "train.max_steps", "train.epochs",
    "train.micro_batch_size", "train.activation_checkpointing", "train.fused", "train.profile",
    "train.on_nonfinite", "eval.every", "eval.samples", "quant.backend", "quant.cache_dir",
    "quant.offload_meta", "quant.save", "parallel.strategy", "parallel.hsdp", "parallel.offload",
    "parallel.consistency_check_every", "data.show", "data.max_bad_rows",
    "data.workers", "data.cache_dir", "eval.cache_dir", "export.max_error", "export.max_kl",
])  # fmt: skip
"""Keys that may change when a run is resumed under the same `run.name`."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The whole configuration of one command.

    `groups.py` and `infra.py` declare the keys of each group.
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
    export: ExportConfig = field(default_factory=ExportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    ckpt: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run: RunDirConfig = field(default_factory=RunDirConfig)

    def check(self) -> None:
        """Check every key and every combination of keys.

        Raises:
            UserError: with one line for every error, all at once.
        """
        if errors := [*self.key_errors(), *self._combination_errors()]:
            raise UserError("\n".join(errors))

    def key_errors(self) -> Iterator[str]:
        """Yield one message for every value that its key does not allow in any combination."""
        # `task` and `recipe` are in no group: remove the `.` after the empty name of the group.
        yield from (message.removeprefix(".") for message in field_errors("", self))
        for item in fields(self):
            group = getattr(self, item.name)
            if is_dataclass(group):
                renamed = list(renamed_value_errors(item.name, group))
                yield from renamed or field_errors(item.name, group)
                yield from _large_integer_errors(item.name, group)
                yield from group.errors() if hasattr(group, "errors") else ()

    def _combination_errors(self) -> Iterator[str]:
        """Yield one message for every combination of keys, and every range, that is not allowed."""
        yield from conflict_errors(
            CONFIG_CONFLICTS, {f.name: getattr(self, f.name) for f in fields(self)}
        )
        yield from self.track.combination_errors()
        yield from self.launch.combination_errors()
        pushes_base = self.hub.push and self.task == "finetune" and self.quant.quantizes
        if pushes_base and not self.quant.save:
            yield (
                f"hub.push={self.hub.push}: also pushes the base of the adapter, which "
                "quant.save=false does not keep; use quant.save=true."
            )
        if self.train.max_grad_norm == 0:
            yield "train.max_grad_norm=0: must be above 0, or null for no clipping."
        if self.eval.every is None or self.eval.source is None:
            yield from self._best_checkpoint_errors()

    def _best_checkpoint_errors(self) -> Iterator[str]:
        """Yield one message for every key that needs evaluations during training."""
        best = "lowest eval/loss; set eval.every and eval.source, or"
        if self.ckpt.keep_best:
            yield (
                f"ckpt.keep_best={self.ckpt.keep_best}: the best checkpoints are those with the "
                f"{best} keep_best=0."
            )
        if self.ckpt.load_best:
            yield f"ckpt.load_best=true: the best checkpoint is that with the {best} false."
        if patience := self.train.early_stopping_patience:
            yield (
                f"train.early_stopping_patience={patience}: counts evaluations; set eval.every and "
                "eval.source, or null."
            )

    def eval_protocol(self) -> dict[str, Any]:
        """Return how perplexity is measured: `protocol`, `context` and `stride` by these names."""
        context, stride = self.eval.window_shape(self.train.max_seq_len)
        return {"protocol": self.eval.protocol, "context": context, "stride": stride}

    @property
    def has_run_directory(self) -> bool:
        """Whether the task writes a run directory."""
        return self.task not in TASKS_WITHOUT_RUN

    def run_name(self) -> str:
        """Return `run.name`, or by default the recipe (or task) and a short hash of `identity`.

        task=data adds `-data` to `run.name`, so that the same command can look at the data first,
        and train afterwards.
        """
        if self.run.name:
            return f"{self.run.name}-data" if self.task == "data" else self.run.name
        return f"{self.recipe or self.task}-{self.identity()[:8]}"

    def identity(self) -> str:
        """Return the sha256, in hex, of all keys that define the result."""
        values = with_old_names(with_added_keys(asdict(self)))
        keys = {k: v for k, v in values.items() if k not in NON_RESULT_GROUPS}
        keys |= {
            group: {name: values[group][name] for name in names}
            for group, names in RESULT_KEYS.items()
        }
        for group, defaults in ADDED_GROUPS.items():
            if keys[group] == defaults:
                del keys[group]
        for group, added in ADDED_KEYS.items():
            keys[group] = {k: v for k, v in keys[group].items() if (k, v) not in added.items()}
        keys = {group: value for group, value in keys.items() if value != {}}
        for group, names in _NON_RESULT_KEYS.items():
            keys[group] = {k: v for k, v in keys[group].items() if k not in names}
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def with_added_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as this version means it, whichever version has written it.

    Groups and keys that it lacks get their defaults. `eval.source=auto` becomes the source that it
    stands for, because both define the same result.
    """
    values = ADDED_GROUPS | values
    for group, added in ADDED_KEYS.items():
        values[group] = added | values.get(group, {})
    evaluation = values.get("eval", {})
    if evaluation.get("source") == AUTO:
        values["eval"] = {**evaluation, "source": values["data"].get("source")}
    return values


def _large_integer_errors(group: str, config: Any) -> Iterator[str]:
    """Yield one message for every integer of `group` that PyTorch's 64 bits cannot hold."""
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, int) and value >= 2**63:
            yield f"{group}.{item.name}={value}: must be below 2^63."
