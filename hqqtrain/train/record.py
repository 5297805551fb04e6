"""The record of a run: its directory, summary, metrics, terminal and report, in one place.

Tasks tell it what happened; only the main rank writes. The directory is begun once the model
is quantized, so that bad weights leave nothing behind.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from torch import Tensor

from hqqtrain.ckpt import RunDirectory
from hqqtrain.config import UserError
from hqqtrain.data import Sequences, dataset_name
from hqqtrain.dist import count
from hqqtrain.track import (
    LAYER_ERROR,
    Console,
    Progress,
    Trackers,
    open_trackers,
    setup_logging,
    write_report,
)  # fmt: skip
from hqqtrain.train.evaluation import Measured
from hqqtrain.train.loop import Trained
from hqqtrain.train.plan import Plan
from hqqtrain.train.prepare import Built
from hqqtrain.train.session import Session
from hqqtrain.train.summary import Summary

logger = logging.getLogger(__name__)

_RESULTS = (
    "quantized", "adapter", "export", "checkpoints", "summary.json", "metrics.jsonl",
    "report/index.html",
)  # fmt: skip


class Record:
    """Use as a context manager around the task: it ends the run's files whatever happens."""

    def __init__(self, session: Session, command: list[str]) -> None:
        self.session, self.config, self.command = session, session.config, command
        self.main = session.processes.is_main
        setup_logging(self.main)
        self.directory = RunDirectory(self.config)
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
                self._failed(error) if error else self._finished()
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

    def path(self, name: str) -> Path:
        """Where `name` lies in the run's directory."""
        return self.directory.path / name

    @contextmanager
    def quantizing(self, plan: Plan, *, loads: bool) -> Iterator[Callable[[str], None]]:
        """A progress bar over the layers; yields what to call after each."""
        verb = "loading" if loads else "quantizing"
        with self.console.progress(verb, plan.layers, "layer") as bar:
            yield lambda name: bar.update(1, layer=name)

    def quantized(self, plan: Plan, built: Built) -> None:
        """The model is there: begins the run's directory. Collective."""
        self.summary.quantized(plan, built)
        self.layer_errors = built.layer_errors
        if not self.main:
            return
        for report in built.loading:
            logger.info("%s", report)
        self.directory.begin(self.command)
        self.directory.write_loading([report.facts() for report in built.loading])
        self._begun = True
        self.trackers = open_trackers(self.config.track, self.directory.path, asdict(self.config))
        errors = {f"{LAYER_ERROR}{name}": error for name, error in built.layer_errors.items()}
        self.trackers.log(errors, 0)

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """A progress bar over the steps."""
        with self.console.progress("training", steps, "step") as self._bar:
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

    def _finished(self) -> None:
        parts = self.summary.parts
        self.directory.write_summary(parts)
        self.trackers.summary(parts)
        self._report()
        if (adapter := self.path("adapter")).exists():
            self.trackers.artifact(adapter)
        hints = self.trackers.hints()
        self.trackers.finish(0)
        self.directory.write_status("done", exit_code=0)
        written = [self.path(name) for name in _RESULTS if self.path(name).exists()]
        self.console.results(self.summary.rows(), written, hints)

    def _report(self) -> None:
        """Draws report/; a plot that fails is no reason to call a finished run failed."""
        folder = self.directory.path
        try:
            files = write_report(
                folder, folder / "metrics.jsonl", self.summary.parts, self.layer_errors
            )
            self.trackers.images({n: p for n, p in files.items() if p.suffix == ".png"})
        except Exception as error:
            logger.warning("report/ was not written: %r", error)

    def _failed(self, error: BaseException) -> None:
        code = 2 if isinstance(error, UserError) else 1
        self.trackers.finish(code)
        self.directory.write_status(
            "failed", exit_code=code, cause=f"{type(error).__name__}: {error}"
        )
