"""The record of a run: its directory, summary, metrics, terminal and report, in one place.

Tasks tell it what happened; only the main rank writes. The directory is begun once the model
is quantized, so that bad weights leave nothing behind.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from hqqtrain.ckpt import Checkpoint, CheckpointStore, RunDirectory, atomic_write_json
from hqqtrain.data import Sequences, dataset_name
from hqqtrain.dist import count
from hqqtrain.tasks.ending import end_badly, end_well
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built
from hqqtrain.tasks.summary import Summary
from hqqtrain.track import (
    LAYER_ERROR,
    Console,
    Progress,
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
        self.trackers = Trackers([])
        self.summary = Summary(session)
        self.step_number = 0
        self.layer_errors: dict[str, float] = {}
        self._bar: Progress | None = None
        self._begun = False

    def __enter__(self) -> "Record":
        with self.session.processes.together():
            if self.main:
                self.directory.__enter__()
        token = self.session.processes.gather(self.directory.token() if self.main else "")[0]
        with self.session.processes.together():
            self.directory.check_shared(token)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if not self.main:
            return
        try:
            if self._begun:
                end_badly(self, error) if error else end_well(self)
        finally:
            self.directory.__exit__(kind, error, trace)

    def is_done(self) -> bool:
        """Whether this run was finished before; says so. Collective."""
        with self.session.processes.together():
            mine = self.main and self.directory.done()
        done = self.session.processes.gather(mine)[0]
        if done:
            logger.info("%s is done already: see summary.json there.", self.directory.path)
        return done

    @property
    def begins_anew(self) -> bool:
        """Whether `run.resume=never` holds: not for a job that slurm has requeued, which has
        begun."""
        requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        return self.config.run.resume == "never" and not requeued

    @property
    def was_finished(self) -> bool:
        """Whether the directory holds a finished run, of this configuration or nearly so."""
        return self.directory.status().get("status") == "done"

    def has_quantized(self) -> bool:
        """Whether this run has quantized before, from the files that are there now. Collective."""
        mine = self.main and not self.begins_anew and self.directory.holds("quantized")
        return self.session.processes.gather(mine)[0]

    def path(self, name: str) -> Path:
        """Where `name` lies in the run's directory."""
        return self.directory.path / name

    @contextmanager
    def quantizing(self, plan: Plan, *, loads: bool) -> Iterator[Callable[[str], None]]:
        """A progress bar over the layers; yields what to call after each."""
        verb = "loading" if loads else "quantizing"
        with self.console.progress(verb, plan.layers, "layer") as bar:

            def on_layer(name: str) -> None:
                bar.update(1, layer=name)
                self.session.interrupt.check_alone()

            yield on_layer

    def quantized(self, plan: Plan, built: Built, found: Checkpoint | None = None) -> None:
        """The model is there: begins the run's directory, or goes on as `found`. Collective."""
        self.summary.quantized(plan, built)
        self.layer_errors = built.layer_errors
        if found:
            self._restore(found)
        if not self.main:
            return
        for report in built.loading:
            logger.info("%s", report)
        self.directory.begin(self.command)
        self.directory.write_loading([report.facts() for report in built.loading])
        self._begun = True
        self.trackers = open_trackers(
            self.config.track, self.directory.path, asdict(self.config), self.step_number
        )
        errors = {f"{LAYER_ERROR}{name}": error for name, error in self.layer_errors.items()}
        if not found:
            self.trackers.log(errors, 0)

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
        if self.main and state["wandb_run_id"] and not run_id(self.directory.path):
            keep_run_id(self.directory.path, state["wandb_run_id"])

    def has_measured(self, part: str) -> bool:
        """Whether `part` of the summary was measured, by this process or one before it."""
        return part in self.summary.parts.get("eval", {})

    def nonfinite(self, step: Step, facts: dict[str, Any], tokens: list[list[int]]) -> None:
        """A global batch, of sequences of `tokens`, gave what is not finite."""
        if self.main:
            told = facts | {"batch": step.place, "step": self.step_number + 1}
            told |= {"loss": str(step.loss), "grad_norm": str(step.norm)}
            told |= {"samples": step.samples, "tokens": tokens}
            folder = self.path("nonfinite")
            folder.mkdir(exist_ok=True)
            atomic_write_json(folder / f"batch-{step.place:08}.json", told)

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[None]:
        """A progress bar over the steps, of which `done` were taken before."""
        with self.console.progress("training", steps, "step", done) as self._bar:
            yield

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """An optimizer step was taken. Collective."""
        self.step_number = step
        metrics = metrics | {"memory/peak_gib": self.session.peak_memory_gib()}
        self.trackers.log(metrics, step)
        if self._bar:
            rate = metrics["train/tokens_per_second"]
            self._bar.update(1, loss=metrics["train/loss"], **{"tokens/s": rate})

    def trained(self, done: Trained, parameters: Sequence[Tensor]) -> None:
        """The training is over. Collective."""
        self.summary.trained(done, sum(map(count, parameters)))

    @contextmanager
    def evaluating(self, held_out: Sequences) -> Iterator[Callable[[int], None]]:
        """A progress bar over this rank's share of the tokens; yields what to call per batch."""
        share = -(-held_out.tokens // self.session.processes.size)
        with self.console.progress("evaluating", share, "token") as bar:
            yield bar.update

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
