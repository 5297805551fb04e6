"""Weights & Biases: online where there is a key and a network, else a file to sync later.

wandb asks for a key, waits for a server and prints; a training run may do none of that. So the
mode is decided within seconds (online.py), every wait has a limit, a server that takes the run
and then fails leaves it offline, and the rest is `CompositeTracker`' work. A run that is resumed is the
same run: online it goes on from what the server has, offline it is one more file of its id.
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

from hqqtrain.common.secrets import mask_command, mask_secrets
from hqqtrain.common.timeout import call_with_timeout
from hqqtrain.config.infra import TrackConfig
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import GLOBAL_STEP, LAYER_ERROR
from hqqtrain.tracking.base import flatten, layer_errors
from hqqtrain.tracking.jsonl import read_metrics
from hqqtrain.tracking.wandb_mode import is_server_reachable, wandb_mode, wandb_server
from hqqtrain.tracking.wandb_run_id import keep_run_id, run_id

logger = logging.getLogger(__name__)

INIT_SECONDS, FINISH_SECONDS, UPLOAD_SECONDS = 30.0, 30.0, 600.0
"""Limits: to begin, to send the last figures at the end, to upload an adapter."""

SLACK_SECONDS = 10.0
"""What wandb's own process may take to notice that its time to send is over."""

FLUSH_SECONDS = 1.0
"""How often its file is written; a killed process loses rows since, but not in metrics.jsonl."""


class WandbTracker:
    """A W&B run inside `run_dir`; its id is kept there, so a resumed run is the same run."""

    def __init__(self, run_dir: Path, config: TrackConfig) -> None:
        self.run_dir, self.config = run_dir, config
        self._run: Any = None

    def start(self, config: Mapping[str, Any], step: int = 0) -> None:
        if importlib.util.find_spec("wandb") is None:
            logger.warning("track.backends=[wandb]: wandb is not installed; the run goes on "
                           "without it. pip install wandb, or set track.backends=[].")  # fmt: skip
            return
        if run_id(self.run_dir) is None:
            keep_run_id(self.run_dir, secrets.token_hex(4))
        self._run = self._open(mask_secrets(config))
        self._run.define_metric(GLOBAL_STEP)
        self._run.define_metric("*", step_metric=GLOBAL_STEP)
        self._run.define_metric(LAYER_ERROR + "*", step_metric=GLOBAL_STEP, hidden=True)
        where = (
            self._run.url if self._online else f"{self._mode}, in {RunLayout(self.run_dir).wandb}"
        )
        logger.info("wandb: %s", where)
        if step and self._online:
            self._catch_up()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # A run that was killed after a checkpoint repeats steps that the server has already.
        if self._run is None or step < self._run.starting_step:
            return
        row: dict[str, Any] = {**metrics, GLOBAL_STEP: step}
        if layers := layer_errors(metrics):
            import wandb

            columns: list[str | int] = ["module", "relative_error"]
            rows = [[name, error] for name, error in layers.items()]
            row["quant/relative_errors"] = wandb.Table(columns=columns, data=rows)
        self._run.log(row, step=step)

    def summary(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(flatten(summary))

    def images(self, paths: Mapping[str, Path]) -> None:
        if self._run is not None and paths:
            import wandb

            self._run.log({f"report/{n}": wandb.Image(str(path)) for n, path in paths.items()})

    def artifact(self, path: Path) -> None:
        """Where `track.artifacts` asks for it. One that fails is no reason to leave the run."""
        if self._run is None or not self.config.artifacts:
            return
        try:
            if self._online and not is_server_reachable():
                raise TimeoutError(f"{wandb_server()} does not answer")
            self._upload(path)
        except Exception as error:
            logger.warning("wandb: the adapter was not uploaded: %s", mask_secrets(str(error)))

    def hint(self) -> str | None:
        if self._run is None or self._mode == "disabled":
            return None
        if self._online:
            return f"W&B: {self._run.url}"
        # Without it, `sync` of the second file of a resumed run overwrites the first one's rows.
        return f"W&B: WANDB_RESUME=allow wandb sync {self.run_dir}/wandb/offline-run-*"

    def finish(self, exit_code: int) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None

        def end() -> None:
            run.finish(exit_code=exit_code)
            _wandb_forgets(exit_code)  # until then the last rows may not be in the file

        call_with_timeout(FINISH_SECONDS + SLACK_SECONDS, end, helpers="wandb-")

    def _catch_up(self) -> None:
        """Tells the server what it lacks of earlier processes, which it may have failed."""
        file = RunLayout(self.run_dir).metrics_jsonl
        for row in read_metrics(file) if file.exists() else []:
            metrics = {
                name: value for name, value in row.items() if name not in (GLOBAL_STEP, "time")
            }
            self.log({n: v for n, v in metrics.items() if v is not None}, row[GLOBAL_STEP])

    def _upload(self, path: Path) -> None:
        """Returns when the server has it; offline the files stay where they are until a sync."""
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self.run_dir.name}-adapter")
        artifact = wandb.Artifact(name[-128:], type="model")
        for file in sorted(path.iterdir()):
            artifact.add_file(str(file), policy="immutable")  # it is written once: no copy
        logged = self._run.log_artifact(artifact)
        if self._online:
            logged.wait(timeout=int(UPLOAD_SECONDS))

    @property
    def _online(self) -> bool:
        return self._mode not in ("offline", "dryrun", "disabled")  # otherwise there is no URL

    def _open(self, config: dict[str, Any]) -> Any:
        """The run, offline if the server lets it down."""
        # wandb's reports to its authors: where no server answers, a program waits for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._mode = wandb_mode()
        try:
            return self._init(config)
        except Exception as error:
            if not self._online:
                raise
            logger.warning("wandb: %s; the run is kept offline.", mask_secrets(str(error)))
            self._mode = "offline"
            _wandb_forgets(1)
            return self._init(config)

    def _init(self, config: dict[str, Any]) -> Any:
        import wandb

        track = self.config
        where = {"project": track.project, "entity": track.entity, "group": track.group}
        with _masked_words():
            return wandb.init(
                **mask_secrets(where), job_type=config.get("task"), name=self.run_dir.name,
                id=run_id(self.run_dir), dir=str(self.run_dir), config=config, mode=self._mode,
                resume="allow" if self._online else None, settings=_settings(wandb),
            )  # fmt: skip


def _settings(wandb: Any) -> Any:
    """Silent, no capture of the console, no copy of the code, and no wait without an end.

    Of git the commit alone: the address of its remote may hold a token.
    """
    flush = "x_transaction_log_flush_interval"  # of newer versions; theirs is 15 s
    known = {flush: FLUSH_SECONDS} if flush in wandb.Settings.model_fields else {}
    return wandb.Settings(
        silent=True, console="off", save_code=False, git_remote="", login_timeout=INIT_SECONDS,
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, **known,
    )  # fmt: skip


def _wandb_forgets(exit_code: int) -> None:
    """Ends wandb's own process, and with it what it holds of a run."""
    import wandb

    wandb.teardown(exit_code)


@contextmanager
def _masked_words() -> Iterator[None]:
    """wandb saves the command line with the run; without secrets, then."""
    words = sys.argv
    sys.argv = mask_command(words)
    try:
        yield
    finally:
        sys.argv = words
