"""The Weights & Biases tracker. With a key and a network it is online; otherwise it writes a file.

The user can send the file later with `wandb sync`. By itself wandb prompts for a key, waits for its
server, and prints; a training run must do none of these. So the mode is decided within seconds
(wandb_mode.py), and every wait has a timeout. If the server fails at the start, the run is kept
offline. `CompositeTracker` handles all other failures.

A resumed run is the same W&B run. Online, it continues after the rows that the server has. Offline,
it writes another file with the same id.
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

from hqqtrain.common.files import atomic_write
from hqqtrain.common.reading import read_bounded
from hqqtrain.common.secrets import mask_command, mask_secrets
from hqqtrain.common.threads import call_with_timeout
from hqqtrain.config.infra import TrackConfig
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import GLOBAL_STEP, LAYER_ERROR_PREFIX
from hqqtrain.tracking.base import flatten, layer_errors
from hqqtrain.tracking.jsonl import read_metrics
from hqqtrain.tracking.wandb_mode import choose_wandb_mode, is_server_reachable, wandb_server

logger = logging.getLogger(__name__)

INIT_SECONDS, FINISH_SECONDS, UPLOAD_SECONDS = 30.0, 30.0, 600.0
"""Timeouts: to start a run, to send the last rows at the end, and to upload an adapter."""

SLACK_SECONDS = 10.0
"""Extra time for wandb's own process to notice that `FINISH_SECONDS` are over."""

_MAX_RUN_ID_BYTES = 1024

FLUSH_SECONDS = 1.0
"""Seconds between two writes of the offline file.

If the process is killed, this file lacks the rows since the last write; metrics.jsonl has them.
"""


class WandbTracker:
    """Logs to W&B. The id is kept in `run_dir`, so that a resumed run is the same W&B run."""

    shows_images = True

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
        if read_run_id(self.run_dir) is None:
            save_run_id(self.run_dir, secrets.token_hex(4))
        self._run = self._open(mask_secrets(config))
        self._run.define_metric(GLOBAL_STEP)
        self._run.define_metric("*", step_metric=GLOBAL_STEP)
        self._run.define_metric(LAYER_ERROR_PREFIX + "*", step_metric=GLOBAL_STEP, hidden=True)
        where = (
            self._run.url
            if self._is_online
            else f"{self._mode}, in {RunLayout(self.run_dir).wandb}"
        )
        logger.info("wandb: %s", where)
        if step and self._is_online:
            self._send_missing_rows()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # A resumed run repeats the steps after its checkpoint, which the server may already have.
        if self._run is None or step < self._run.starting_step:
            return
        row: dict[str, Any] = {**metrics, GLOBAL_STEP: step}
        if errors := layer_errors(metrics):
            import wandb

            columns: list[str | int] = ["module", "relative_error"]
            table_rows = [[name, error] for name, error in errors.items()]
            row["quant/relative_errors"] = wandb.Table(columns=columns, data=table_rows)
        self._run.log(row, step=step)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(flatten(summary))

    def log_images(self, paths: Mapping[str, Path]) -> None:
        if self._run is not None and paths:
            import wandb

            images = {f"report/{name}": wandb.Image(str(path)) for name, path in paths.items()}
            self._run.log(images)

    def log_artifact(self, path: Path) -> None:
        """Upload the adapter if `track.artifacts` is set. A failed upload is only a warning."""
        if self._run is None or not self.config.artifacts:
            return
        try:
            if self._is_online and not is_server_reachable():
                raise TimeoutError(f"{wandb_server()} does not answer")
            self._upload(path)
        except Exception as error:
            logger.warning("wandb: the adapter was not uploaded: %s", mask_secrets(str(error)))

    def hint(self) -> str | None:
        if self._run is None or self._mode == "disabled":
            return None
        if self._is_online:
            return f"W&B: {self._run.url}"
        # Without WANDB_RESUME, syncing the second file of a resumed run overwrites the first rows.
        return f"W&B: WANDB_RESUME=allow wandb sync {self.run_dir}/wandb/offline-run-*"

    def finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None

        def finish_and_stop() -> None:
            run.finish(exit_code=exit_code)
            _stop_service(exit_code)  # until it ends, the last rows may be missing in the file

        call_with_timeout(
            FINISH_SECONDS + SLACK_SECONDS, finish_and_stop, child_process_prefix="wandb-"
        )

    def _send_missing_rows(self) -> None:
        """Send the rows of earlier processes again; `log` skips those that the server has.

        The server may have missed rows while it was unreachable.
        """
        file = RunLayout(self.run_dir).metrics_jsonl
        for row in read_metrics(file) if file.exists() else []:
            metrics = {
                name: value
                for name, value in row.items()
                if name not in (GLOBAL_STEP, "time") and value is not None
            }
            self.log(metrics, row[GLOBAL_STEP])

    def _upload(self, path: Path) -> None:
        """Upload the adapter and wait for the server; offline a later sync uploads it."""
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self.run_dir.name}-adapter")
        artifact = wandb.Artifact(name[-128:], type="model")
        for file in sorted(path.iterdir()):
            # The files never change, so wandb need not copy them.
            artifact.add_file(str(file), policy="immutable")
        logged = self._run.log_artifact(artifact)
        if self._is_online:
            logged.wait(timeout=int(UPLOAD_SECONDS))

    @property
    def _is_online(self) -> bool:
        """Whether the run is sent to a server and has a URL."""
        return self._mode not in ("offline", "dryrun", "disabled")

    def _open(self, config: dict[str, Any]) -> Any:
        """Start the W&B run; keep it offline if the server fails."""
        # Disable wandb's crash reports: without a network, a program waits for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._mode = choose_wandb_mode()
        try:
            return self._init(config)
        except Exception as error:
            if not self._is_online:
                raise
            logger.warning("wandb: %s; the run is kept offline.", mask_secrets(str(error)))
            self._mode = "offline"
            _stop_service(1)
            return self._init(config)

    def _init(self, config: dict[str, Any]) -> Any:
        import wandb

        track = self.config
        names = {"project": track.project, "entity": track.entity, "group": track.group}
        with _masked_command_line():
            return wandb.init(
                **mask_secrets(names),
                job_type=config.get("task"),
                name=self.run_dir.name,
                id=read_run_id(self.run_dir),
                dir=str(self.run_dir),
                config=config,
                mode=self._mode,
                resume="allow" if self._is_online else None,
                settings=_settings(wandb),
            )


def read_run_id(run_dir: Path) -> str | None:
    """Return the W&B id of the run; None if there is none yet, or if W&B would refuse it.

    The id is kept in the run directory, so that a requeued run stays one run in W&B. Checkpoints
    contain it as well, for a run directory that was copied without W&B's files.
    """
    try:
        run_id = read_bounded(_run_id_file(run_dir), _MAX_RUN_ID_BYTES).decode().strip()
    except (OSError, ValueError):  # there is none, or the file is not one of ours
        return None
    return run_id if re.fullmatch(r"[\w-]{1,128}", run_id, re.ASCII) else None


def save_run_id(run_dir: Path, run_id: str) -> None:
    """Save `run_id` as the W&B id of the run."""
    file = _run_id_file(run_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, run_id)


def delete_run_id(run_dir: Path) -> None:
    """Delete the id of a run that starts over: W&B would drop the steps that it already has."""
    _run_id_file(run_dir).unlink(missing_ok=True)


def _run_id_file(run_dir: Path) -> Path:
    return RunLayout(run_dir).wandb / "run_id"


def _settings(wandb: Any) -> Any:
    """Return settings of wandb: no console output or capture, no copies of code, and timeouts.

    wandb records the git commit, but not the remote, because its URL may contain a token.
    """
    flush_setting = "x_transaction_log_flush_interval"  # newer versions only; default 15 s
    is_known = flush_setting in wandb.Settings.model_fields
    optional = {flush_setting: FLUSH_SECONDS} if is_known else {}
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
    """Stop wandb's own process, which also forgets its run."""
    import wandb

    wandb.teardown(exit_code)


@contextmanager
def _masked_command_line() -> Iterator[None]:
    """Mask secrets in `sys.argv`, because wandb saves the command line with the run."""
    arguments = sys.argv
    sys.argv = mask_command(arguments)
    try:
        yield
    finally:
        sys.argv = arguments
