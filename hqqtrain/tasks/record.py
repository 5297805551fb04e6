"""The record of a run: its directory, summary, metrics, terminal and report, in one place.

Tasks tell it what happened; only the main rank writes. The directory is begun once the model
is quantized, so that bad weights leave nothing behind.
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
    """Use as a context manager around the task: it ends the run's files whatever happens."""

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
        self._begun = False

    def __enter__(self) -> "Record":
        processes = self.session.processes
        processes.on_main(self._take)
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

    def _take(self) -> None:
        self.directory.__enter__()

    def _end_well(self) -> None:
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
        """Where `name` lies in the run's directory."""
        return self.directory.path / name

    def quantized(self, plan: Plan, built: Built, found: Checkpoint | None = None) -> None:
        """The model is there: begins the run's directory, or goes on as `found`. Collective."""
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
        """What a checkpoint holds of the record, as JSON."""
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
        """Whether `part` of the summary was measured, by this process or one before it."""
        return part in self.summary.parts.get("eval", {})

    def nonfinite(self, step: Step, facts: dict[str, Any], tokens: list[list[int]]) -> None:
        """A global batch, of sequences of `tokens`, gave what is not finite."""
        if not self.main:
            return
        told = facts | {"batch": step.place, "step": step.number}
        told |= {"loss": str(step.loss), "grad_norm": str(step.norm)}
        told |= {"samples": step.samples, "tokens": tokens}
        folder = self.path("nonfinite")
        try:
            folder.mkdir(exist_ok=True)
            atomic_write_json(folder / f"batch-{step.place:08}.json", told)
        except OSError as error:
            logger.error("%s: batch %d was not kept: %s", folder, step.place, error)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """An optimizer step was taken. Collective."""
        self.step_number = step
        metrics = metrics | {"memory/peak_gib": self.session.peak_memory_gib()}
        self.trackers.log(metrics, step)
        self.bars.step(metrics)

    def trained(self, done: Trained, parameters: Sequence[Tensor]) -> None:
        """The training is over. Collective."""
        self.summary.trained(done, sum(map(count, parameters)))

    def reference_read(self, bytes_read: int) -> None:
        """The full-precision model was read."""
        self.summary.reference_read(bytes_read)

    def evaluated(self, part: str, measured: Measured) -> None:
        """`part` of the summary, `quantized` or `final`, was measured."""
        dataset = dataset_name(self.config.eval, self.config.data)
        self.summary.evaluated(dataset, part, measured)
        self.evaluated_between(measured)

    def evaluated_between(self, measured: Measured) -> None:
        """A point of the evaluation's curve."""
        metrics = {"eval/loss": measured.loss, "eval/perplexity": measured.perplexity}
        if measured.kl is not None:
            metrics["eval/kl"] = measured.kl
        self.trackers.log(metrics, self.step_number)

    def figures(self) -> dict[str, float]:
        """The perplexities so far, by the name of the model."""
        rows = self.summary.rows()
        return {f"perplexity, {r.model}": r.perplexity for r in rows if r.perplexity is not None}
