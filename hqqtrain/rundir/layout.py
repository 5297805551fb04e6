"""The paths of a run directory, defined once for all modules that read or write one.

<run.root>/<run.name>/
    config.yaml      resolved configuration, versions, git revision, command
    status.json      running, done, preempted or failed; see `schema.Status`
    summary.json     the final results; see `schema.Summary`
    loading.json     time and memory that loading the model took, per rank
    metrics.jsonl    one object for each logged step
    quantized/       the packed model
    adapter/         the trained adapter, stock PEFT
    export/          what task=export writes
    checkpoints/     step-00000100/, ...: complete or absent
    nonfinite/       batches whose loss or gradient was not finite
    profile/         trace.json.gz and parts.csv of train.profile
    report/          plots and index.html, also during the run; data.html of task=data
    wandb/           files of W&B
"""

import re
from dataclasses import dataclass
from pathlib import Path

from hqqtrain.common.reading import MAX_JSON_BYTES, read_bounded

_STEP_PREFIX = "step-"

_TASK_LINE = re.compile(rb"^task: (\w+)$", re.MULTILINE)
"""The line of config.yaml with the task of the run."""


@dataclass(frozen=True)
class RunLayout:
    """The paths of the run in `folder`. Each task writes only some of them."""

    folder: Path

    @property
    def config_yaml(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def status_json(self) -> Path:
        return self.folder / "status.json"

    @property
    def summary_json(self) -> Path:
        return self.folder / "summary.json"

    @property
    def loading_json(self) -> Path:
        return self.folder / "loading.json"

    @property
    def metrics_jsonl(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def quantized(self) -> Path:
        return self.folder / "quantized"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def nonfinite(self) -> Path:
        return self.folder / "nonfinite"

    @property
    def profile(self) -> Path:
        return self.folder / "profile"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def report_html(self) -> Path:
        return self.report / "index.html"

    @property
    def data_html(self) -> Path:
        return self.report / "data.html"

    @property
    def wandb(self) -> Path:
        return self.folder / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def lock(self) -> Path:
        return self.folder / ".lock"

    @property
    def has_quantized(self) -> bool:
        """Whether `quantized/` is there; it is complete or absent."""
        return (self.quantized / "config.json").is_file()

    @property
    def has_adapter(self) -> bool:
        """Whether `adapter/` is there; it is complete or absent."""
        return (self.adapter / "adapter_config.json").is_file()

    def written_in_place(self) -> list[Path]:
        """Return the files and folders that a run writes to without replacing them as a whole."""
        folders = [self.checkpoints, self.nonfinite, self.profile, self.report, self.wandb]
        folders.append(self.tensorboard)
        jsons = [self.status_json, self.summary_json, self.loading_json, self.metrics_jsonl]
        return [self.lock, self.config_yaml, *jsons, *folders]

    def read_task(self) -> str | None:
        """Return the task of the run; None if config.yaml does not say it."""
        try:
            match = _TASK_LINE.search(read_bounded(self.config_yaml, MAX_JSON_BYTES))
        except (OSError, ValueError):
            return None
        return match[1].decode() if match else None

    def existing_results(self) -> list[Path]:
        """Return those of the paths that a user looks for after a run which exist."""
        paths = [self.quantized, self.adapter, self.export, self.checkpoints]
        paths += [self.summary_json, self.metrics_jsonl, self.report_html, self.data_html]
        return [path for path in paths if path.exists()]


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of the checkpoint of optimizer step `step`."""
    return f"{_STEP_PREFIX}{step:08}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints in the folder `checkpoints`, ascending.

    Other names than `step-NUMBER` are ignored, because a user may keep files there.
    """
    paths = checkpoints.glob(f"{_STEP_PREFIX}*")
    numbers = (path.name.removeprefix(_STEP_PREFIX) for path in paths)
    return sorted(int(number) for number in numbers if number.isdecimal())
