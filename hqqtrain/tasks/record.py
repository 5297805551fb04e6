"""Record of a run: one place for its directory, summary, metrics, console and report.

Tasks report events to it on every rank, and only the main rank writes. The run directory gets its
first file once the model is loaded, so that bad weights leave nothing behind.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from hqqtrain.ckpt import Checkpoint, CheckpointStore, RunDirectory, atomic_write_json
from hqqtrain.data import dataset_name
from hqqtrain.dist import count
from hqqtrain.tasks.bars import Bars
from hqqtrain.tasks.ending import end_badly, end_well
from hqqtrain.tasks.faults import explained
from hqqtrain.tasks.history import History
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built
from hqqtrain.tasks.summary import Summary
from hqqtrain.track import (
    LAYER_ERROR,
    Console,
    Trackers,
    keep_run_id,
    open_trackers,
    run_id,
    setup_logging,
)  # fmt: skip
from hqqtrain.train.evaluation import Measured
from hqqtrain.train.progress import Step, Trained
from hqqtrain.train.session import Session

logger = logging.getLogger(__name__)


class Record:
    """Recorder of a run. Use it as a context manager around the task.

    On exit it writes the final files of the run, or the error that ended it.
    """

    def __init__(self, session: Session, command: list[str]) -> None:
        self.session, self.config, self.command = session, session.config, command
        self.main = session.processes.is_main
        setup_logging(self.main)
        self.directory = RunDirectory(self.config)
        config = self.config.ckpt
        self.checkpoints = CheckpointStore(
            self.path("checkpoints"), config.keep_last, config.keep_best
        )
        self.console = Console(self.main)
        self.bars = Bars(self.console, session)
        self.trackers = Trackers([])
        self.summary = Summary(session)
        self.step_number = 0
        self.layer_errors: dict[str, float] = {}
        """Relative quantization error by layer, for the report."""
        self._begun = False  # whether the run directory has files of this process

    def __enter__(self) -> "Record":
        processes = self.session.processes
        processes.on_main(self._lock_directory)
        token = processes.on_main(self.directory.token)
        with processes.together():
            self.directory.check_shared(token)
        self.history = History(self.directory, self.checkpoints, processes)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            if error and self._begun and self.main:
                end_badly(self.directory, self.trackers, error)
            elif self._begun and not error:
                self._end_well()
        finally:
            if self.main:
                self.directory.__exit__(kind, error, trace)

    def _lock_directory(self) -> None:
        self.directory.__enter__()  # returns the directory, which `on_main` would broadcast

    def _end_well(self) -> None:
        """Write the final files on the main rank; record an error that occurs meanwhile."""
        parts = (self.console, self.summary, self.layer_errors)
        try:
            with explained(self.config):
                self.session.processes.on_main(
                    lambda: end_well(self.directory, self.trackers, *parts)
                )
        except Exception as error:
            if self.main:
                end_badly(self.directory, self.trackers, error)
            raise

    def path(self, name: str) -> Path:
        """Return the path of `name` in the run directory."""
        return self.directory.path / name

    def quantized(self, plan: Plan, built: Built, found: Checkpoint | None = None) -> None:
        """Begin the run directory, now that the model is loaded. Collective.

        Args:
            plan: The plan of the model.
            built: The loaded model.
            found: The checkpoint that the run resumes from; the record continues as it was then.
        """
        self.summary.quantized(plan, built)
        self.layer_errors = built.layer_errors
        if found:
            self._restore(found)
        self.session.processes.on_main(lambda: self._begin(built, found))
        self._begun = True
        errors = {f"{LAYER_ERROR}{name}": error for name, error in self.layer_errors.items()}
        if not found:
            self.trackers.log(errors, 0)

    def _begin(self, built: Built, found: Checkpoint | None) -> None:
        for report in built.loading:
            logger.info("%s", report)
        self.directory.begin(self.command)
        self.directory.write_loading([report.facts() for report in built.loading])
        kept = found and found.state["record"]["wandb_run_id"]
        if kept and not run_id(self.directory.path):
            keep_run_id(self.directory.path, kept)
        self.trackers = open_trackers(
            self.config.track, self.directory.path, asdict(self.config), self.step_number
        )

    def state(self) -> dict[str, Any]:
        """Return the part of the record that a checkpoint keeps, as JSON."""
        return {
            "summary": self.summary.state(),
            "layer_errors": self.layer_errors,
            "wandb_run_id": run_id(self.directory.path),
        }

    def _restore(self, found: Checkpoint) -> None:
        state = found.state["record"]
        self.step_number = found.step
        self.summary.restore(state["summary"])
        self.layer_errors = state["layer_errors"]

    def has_measured(self, part: str) -> bool:
        """Whether `part` of the summary was evaluated, by this process or an earlier one."""
        return part in self.summary.parts.get("eval", {})

    def nonfinite(self, step: Step, facts: dict[str, Any], tokens: list[list[int]]) -> None:
        """Save a global batch whose loss or gradient is not finite to `nonfinite/`.

        Args:
            step: The step, with its loss, gradient norm and sample numbers.
            facts: Where the first non-finite value was found.
            tokens: Token ids of every sequence of the batch.
        """
        if not self.main:
            return
        batch = facts | {"batch": step.place, "step": step.number}
        batch |= {"loss": str(step.loss), "grad_norm": str(step.norm)}
        batch |= {"samples": step.samples, "tokens": tokens}
        folder = self.path("nonfinite")
        try:
            folder.mkdir(exist_ok=True)
            atomic_write_json(folder / f"batch-{step.place:08}.json", batch)
        except OSError as error:
            logger.error("%s: batch %d was not saved: %s", folder, step.place, error)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step. Collective."""
        self.step_number = step
        metrics = metrics | {"memory/peak_gib": self.session.peak_memory_gib()}
        self.trackers.log(metrics, step)
        self.bars.step(metrics)

    def trained(self, done: Trained, parameters: Sequence[Tensor]) -> None:
        """Add the training to the summary. Collective.

        Args:
            done: Steps, tokens and time of the training.
            parameters: The trained parameters of this rank, whole or sharded.
        """
        self.summary.trained(done, sum(map(count, parameters)))

    def reference_read(self, bytes_read: int) -> None:
        """Add the bytes read for the full-precision reference model to the summary."""
        self.summary.reference_read(bytes_read)

    def evaluated(self, part: str, measured: Measured) -> None:
        """Add an evaluation to the summary as `part`, `quantized` or `final`, and log it."""
        dataset = dataset_name(self.config.eval, self.config.data)
        self.summary.evaluated(dataset, part, measured)
        self.evaluated_between(measured)

    def evaluated_between(self, measured: Measured) -> None:
        """Log an evaluation during training, a point of the curve."""
        metrics = {"eval/loss": measured.loss, "eval/perplexity": measured.perplexity}
        if measured.kl is not None:
            metrics["eval/kl"] = measured.kl
        self.trackers.log(metrics, self.step_number)

    def figures(self) -> dict[str, float]:
        """Return the perplexities so far, by "perplexity, <model>", for the model card."""
        rows = self.summary.rows()
        return {f"perplexity, {r.model}": r.perplexity for r in rows if r.perplexity is not None}
