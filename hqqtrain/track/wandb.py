"""Weights & Biases: online where there is a key and a network, else a file to sync later.

wandb asks for a key, waits for a server and prints; a training run may do none of that. So the
mode is decided here within seconds, every wait has a limit, and the rest is `Trackers`' work.
Offline, wandb's file lags some seconds behind: a killed process loses those rows there, but not
in metrics.jsonl.
"""

import importlib.util
import logging
import netrc
import os
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hqqtrain.config.secrets import masked
from hqqtrain.track.base import LAYER_ERROR, STEP

logger = logging.getLogger(__name__)

REACH_SECONDS, INIT_SECONDS, FINISH_SECONDS = 3.0, 30.0, 120.0


class WandbTracker:
    """A W&B run inside `run_dir`; its id is kept there, so a resumed run is the same run."""

    def __init__(self, run_dir: Path, *, project: str, entity: str | None = None) -> None:
        self.run_dir, self.project, self.entity = run_dir, project, entity
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            logger.warning("track.backends=[wandb]: wandb is not installed; the run goes on "
                           "without it. pip install wandb, or set track.backends=[].")  # fmt: skip
            return
        import wandb

        mode = _mode()
        self._run = wandb.init(
            project=self.project, entity=self.entity, name=self.run_dir.name, id=self._run_id(),
            dir=str(self.run_dir), config=masked(config), mode=mode, settings=_settings(wandb),
            resume=None if mode == "offline" else "allow",
        )  # fmt: skip
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._run.define_metric(LAYER_ERROR + "*", step_metric=STEP, hidden=True)
        online = mode not in ("offline", "dryrun", "disabled")  # otherwise there is no URL
        where = self._run.url if online else f"{mode}, in {self.run_dir / 'wandb'}"
        logger.info("wandb: %s", where)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._run is None:
            return
        row: dict[str, Any] = {**metrics, STEP: step}
        layers = [[n.removeprefix(LAYER_ERROR), v] for n, v in metrics.items() if LAYER_ERROR in n]
        if layers:
            import wandb

            names: list[str | int] = ["module", "relative_error"]
            row["quant/relative_errors"] = wandb.Table(columns=names, data=layers)
        self._run.log(row)

    def summary(self, summary: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update(_flat(summary))

    def images(self, paths: Mapping[str, Path]) -> None:
        if self._run is not None and paths:
            import wandb

            self._run.log({f"report/{n}": wandb.Image(str(path)) for n, path in paths.items()})

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=exit_code)
            import wandb

            wandb.teardown(exit_code)  # until then the last rows may not be in the file

    def _run_id(self) -> str:
        file = self.run_dir / "wandb" / "run_id"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4))
        return file.read_text().strip()


def _settings(wandb: Any) -> Any:
    """Silent, no capture of the console, no copy of the code, and no wait without an end."""
    return wandb.Settings(
        silent=True, console="off", save_code=False, login_timeout=INIT_SECONDS,
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS,
    )  # fmt: skip


def _mode() -> Any:
    """`online` or `offline`, or what the user has decided by WANDB_MODE or WANDB_DISABLED."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if not _has_key(urlsplit(url).hostname or ""):
        return "offline"
    if not _reachable(url):
        logger.warning("wandb: %s does not answer; the run is kept offline.", url)
        return "offline"
    return "online"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _reachable(url: str) -> bool:
    """True where `url` answers anything in time; a thread, for name lookup knows no limit."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=REACH_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer nonetheless
        except (OSError, ValueError):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(answers)


def _flat(summary: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"eval": {"tokens": 1}} -> {"eval.tokens": 1}: dots, so that no metric is overwritten."""
    flat: dict[str, Any] = {}
    for name, value in summary.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
