"""`train.profile`: a trace of some training steps, and a table of where their time goes."""

import csv
import gzip
import io
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write, make_folder
from hqqtrain.tasks.context import Run
from hqqtrain.training.trace_parts import PartTime, step_parts

logger = logging.getLogger(__name__)

SKIPPED_STEPS = 2
"""Steps before the profiler starts: the first allocates memory and may measure it."""

WARM_UP_STEPS = 1
"""Steps that the profiler needs to become as fast as it will be; they are not in the trace."""


def profile_steps(run: Run, total_steps: int) -> Callable[[], object]:
    """Return a function that is called after each optimizer step, and profiles some of them.

    Rank 0 profiles itself and writes to `profile/` of the run directory.

    Args:
        run: The run, with `train.profile`.
        total_steps: Optimizer steps of the training.

    Raises:
        UserError: The training has too few steps.
    """
    steps = run.config.train.profile
    if steps is None:
        return lambda: None
    needed = SKIPPED_STEPS + WARM_UP_STEPS + steps
    if total_steps < needed:
        raise UserError(
            f"train.profile={steps}: needs {needed} optimizer steps, and the training has "
            f"{total_steps}; set a larger train.max_steps, or null."
        )
    return StepProfiler(steps, run.layout.profile).after_step if run.runtime.comm.is_main else int


class StepProfiler:
    """Profiles `steps` optimizer steps after a warm-up, and writes what it finds to `folder`."""

    def __init__(self, steps: int, folder: Path) -> None:
        self._steps, self._folder, self._count = steps, folder, 0
        self._profiler: profile | None = None

    def after_step(self) -> None:
        """Count a step that has ended; start the profiler, or write its files, if it is due."""
        self._count += 1
        if self._count == SKIPPED_STEPS:
            self._profiler = profile(
                activities=supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA},
                schedule=schedule(wait=0, warmup=WARM_UP_STEPS, active=self._steps, repeat=1),
                on_trace_ready=self._write,
                acc_events=True,  # there is one cycle
            )
            self._profiler.start()
        elif self._profiler:
            self._profiler.step()
            if self._count == SKIPPED_STEPS + WARM_UP_STEPS + self._steps:
                self._profiler.stop()
                self._profiler = None

    def _write(self, profiler: profile) -> None:
        make_folder(self._folder)
        trace = self._folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            parts = step_parts(json.load(file)["traceEvents"])
        atomic_write(self._folder / "parts.csv", _as_csv(parts))
        logger.info(
            "train.profile: %d steps are in %s, for chrome://tracing or ui.perfetto.dev\n%s",
            self._steps, trace, format_parts(parts),
        )  # fmt: skip


def format_parts(parts: list[PartTime]) -> str:
    """Return a table for the log."""
    rows = [(p.part, f"{p.milliseconds:.2f}", f"{p.share:.1%}", f"{p.calls:.0f}") for p in parts]
    headers, align = ("part", "ms per step", "share", "calls"), ("left", *["right"] * 3)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def _as_csv(parts: list[PartTime]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(parts[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(part) for part in parts)
    return text.getvalue()
