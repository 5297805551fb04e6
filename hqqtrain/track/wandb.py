"""The Weights & Biases tracker: online with a key and a network, else a file to sync later.

wandb prompts for a key, waits for its server, and prints; a training run must do none of these.
So the mode is decided within seconds (online.py), every wait has a timeout, and a run whose server
fails at the start is kept offline. `Trackers` handles all other failures. A resumed run is the same
W&B run: online it continues after the rows that the server has, offline it writes another file
with the same id.
"""

import importlib.util
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hqqtrain.config import TrackConfig
from hqqtrain.config.secrets import masked, masked_command
from hqqtrain.track.base import LAYER_ERROR, STEP, flat, layer_errors
from hqqtrain.track.jsonl import read_metrics
from hqqtrain.track.limits import within
from hqqtrain.track.online import mode, reachable, server
from hqqtrain.track.run_id import keep_run_id, run_id

logger = logging.getLogger(__name__)

INIT_SECONDS, FINISH_SECONDS, UPLOAD_SECONDS = 30.0, 30.0, 600.0
"""Timeouts: to start a run, to send the last rows at the end, and to upload an adapter."""

SLACK_SECONDS = 10.0
"""Extra time for wandb's own process to notice that `FINISH_SECONDS` are over."""

FLUSH_SECONDS = 1.0
"""Seconds between two writes of its file. A killed process loses the rows since the last one, but
not those of metrics.jsonl."""


class WandbTracker:
    """Logs to W&B. The id is kept in `run_dir`, so that a resumed run is the same W&B run."""

    def __init__(self, run_dir: Path, config: TrackConfig) -> None:
        self.run_dir, self.config = run_dir, config
        self._run: Any = None

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        if importlib.util.find_spec("wandb") is None:
            logger.warning(
                "track.backends=[wandb]: wandb is not installed; the run continues without it. "
                "pip install wandb, or set track.backends=[]."
            )
            return
        if run_id(self.run_dir) is None:
            keep_run_id(self.run_dir, secrets.token_hex(4))
        self._run = self._open(masked(config))
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._run.define_metric(LAYER_ERROR + "*", step_metric=STEP, hidden=True)
        where = self._run.url if self._online else f"{self._mode}, in {self.run_dir / 'wandb'}"
        logger.info("wandb: %s", where)
        if step and self._online:
            self._send_missing_rows()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # A resumed run repeats the steps after its checkpoint, which the server may already have.
        if self._run is None or step < self._run.starting_step:
            return
        row: dict[str, Any] = {**metrics, STEP: step}
        if layers := layer_errors(metrics):
            import wandb

            columns: list[str | int] = ["module", "relative_error"]
            rows = [[name, error] for name, error in layers.items()]
            row["quant/relative_errors"] = wandb.Table(columns=columns, data=rows)
        self._run.log(row, step=step)

    def summary(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(flat(summary))

    def images(self, paths: Mapping[str, Path]) -> None:
        if self._run is not None and paths:
            import wandb

            self._run.log({f"report/{n}": wandb.Image(str(path)) for n, path in paths.items()})

    def artifact(self, path: Path) -> None:
        """Upload the adapter if `track.artifacts` is set. A failed upload is only a warning."""
        if self._run is None or not self.config.artifacts:
            return
        try:
            if self._online and not reachable():
                raise TimeoutError(f"{server()} does not answer")
            self._upload(path)
        except Exception as error:
            logger.warning("wandb: the adapter was not uploaded: %s", masked(str(error)))

    def hint(self) -> str | None:
        if self._run is None or self._mode == "disabled":
            return None
        if self._online:
            return f"W&B: {self._run.url}"
        # Without WANDB_RESUME, syncing the second file of a resumed run overwrites the first rows.
        return f"W&B: WANDB_RESUME=allow wandb sync {self.run_dir}/wandb/offline-run-*"

    def finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None

        def end() -> None:
            run.finish(exit_code=exit_code)
            _stop_service(exit_code)  # the last rows may be missing in the file before

        within(FINISH_SECONDS + SLACK_SECONDS, end, helpers="wandb-")

    def _send_missing_rows(self) -> None:
        """Send the rows of earlier processes again; `log` skips those that the server has.

        The server may have missed rows while it was unreachable.
        """
        file = self.run_dir / "metrics.jsonl"
        for row in read_metrics(file) if file.exists() else []:
            metrics = {name: value for name, value in row.items() if name not in (STEP, "time")}
            self.log({n: v for n, v in metrics.items() if v is not None}, row[STEP])

    def _upload(self, path: Path) -> None:
        """Upload the adapter and wait for the server; offline a later sync uploads it."""
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self.run_dir.name}-adapter")
        artifact = wandb.Artifact(name[-128:], type="model")
        for file in sorted(path.iterdir()):
            artifact.add_file(str(file), policy="immutable")  # the files never change: no copy
        logged = self._run.log_artifact(artifact)
        if self._online:
            logged.wait(timeout=int(UPLOAD_SECONDS))

    @property
    def _online(self) -> bool:
        """Whether the run is sent to a server and has a URL."""
        return self._mode not in ("offline", "dryrun", "disabled")

    def _open(self, config: dict[str, Any]) -> Any:
        """Start the W&B run; keep it offline if the server fails."""
        # Disable wandb's crash reports: without a network, a program waits for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._mode = mode()
        try:
            return self._init(config)
        except Exception as error:
            if not self._online:
                raise
            logger.warning("wandb: %s; the run is kept offline.", masked(str(error)))
            self._mode = "offline"
            _stop_service(1)
            return self._init(config)

    def _init(self, config: dict[str, Any]) -> Any:
        import wandb

        track = self.config
        names = {"project": track.project, "entity": track.entity, "group": track.group}
        with _masked_command_line():
            return wandb.init(
                **masked(names),
                job_type=config.get("task"),
                name=self.run_dir.name,
                id=run_id(self.run_dir),
                dir=str(self.run_dir),
                config=config,
                mode=self._mode,
                resume="allow" if self._online else None,
                settings=_settings(wandb),
            )


def _settings(wandb: Any) -> Any:
    """Return settings without console output or capture, without code copies, and with timeouts.

    wandb records the git commit, but not the remote, because its URL may contain a token.
    """
    flush = "x_transaction_log_flush_interval"  # in newer versions only; their default is 15 s
    optional = {flush: FLUSH_SECONDS} if flush in wandb.Settings.model_fields else {}
    return wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        git_remote="",
        login_timeout=INIT_SECONDS,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        **optional,
    )


def _stop_service(exit_code: int) -> None:
    """Stop wandb's own process, which also ends its state of a run."""
    import wandb

    wandb.teardown(exit_code)


@contextmanager
def _masked_command_line() -> Iterator[None]:
    """Mask secrets in `sys.argv`, because wandb saves the command line with the run."""
    arguments = sys.argv
    sys.argv = masked_command(arguments)
    try:
        yield
    finally:
        sys.argv = arguments
