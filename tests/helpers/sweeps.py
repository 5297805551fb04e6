"""Small sweeps of invented jobs, and the files that their runs write."""

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
HOSTILE_TEXT = "<script>alert('$x_1$')</script>,\"&\n"


def make_sweep(root: Path, *values: str) -> Sweep:
    """Make a sweep whose jobs differ in `data.source`; its folder exists, its jobs have not run."""
    jobs = []
    for number, value in enumerate(values):
        config = RunConfig(run=RunDirConfig(root=str(root), name=f"job{number}"))
        config.train.seed = number
        jobs.append(Job([f"data.source={value}", f"run.root={root}"], config))
    sweep = Sweep.from_jobs(jobs)
    create_sweep_folder(sweep)
    return sweep


def write_run_files(job: Job, status: object, summary: dict | None = None) -> None:
    """Write the files that a run of `job` would write."""
    job.folder.mkdir(exist_ok=True)
    (job.folder / "status.json").write_text(json.dumps({"status": status}))
    if summary is not None:
        (job.folder / "summary.json").write_text(json.dumps(summary))
