"""Small sweeps of made-up jobs, and the files that their runs leave."""

import json
from pathlib import Path

from hqqtrain.compose.job import Job
from hqqtrain.config.infra import RunDirConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.launch.sweep.report import create_sweep_folder
from hqqtrain.launch.sweep.sweep import Sweep

SUMMARY = {
    "quantize": {"bits_per_weight": 2.5, "relative_error": 0.1, "seconds": 0.5,
                 "peak_memory_gib": 1.0},
    "eval": {"full_precision": {"perplexity": 8.0}, "quantized": {"perplexity": 1234.5, "kl": 0.6},
             "final": {"perplexity": None, "kl": 0.25}},
    "train": {"seconds": 60.0, "peak_memory_gib": 2.0, "tokens_per_second": 1200.4},
}  # fmt: skip
HOSTILE = "<script>alert('$x_1$')</script>,\"&\n"


def sweep_of(root: Path, *values: str) -> Sweep:
    planned = []
    for number, value in enumerate(values):
        config = RunConfig(run=RunDirConfig(root=str(root), name=f"job{number}"))
        config.train.seed = number
        planned.append(Job([f"data.source={value}", f"run.root={root}"], config))
    sweep = Sweep.from_jobs(planned)
    create_sweep_folder(sweep)
    return sweep


def leave(job: Job, status: object, summary: dict | None = None) -> None:
    """Write the files that a run of `job` leaves behind."""
    job.folder.mkdir(exist_ok=True)
    (job.folder / "status.json").write_text(json.dumps({"status": status}))
    if summary is not None:
        (job.folder / "summary.json").write_text(json.dumps(summary))
