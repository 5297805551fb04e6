"""Find out within seconds whether W&B is usable: a key, a network, and a server that answers."""

import configparser
import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

REACH_SECONDS = 3.0
"""Timeout of the request that tests whether the server answers."""


def choose_wandb_mode() -> Any:
    """Return the mode for `wandb.init`, and log the reason if a run is kept offline.

    The user's choice comes first: WANDB_DISABLED, WANDB_MODE, or the command `wandb offline`.
    Otherwise the mode is `online` if there is a key and the server answers, and `offline` if not.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if (mode := _read_wandb_settings().get("mode")) in ("offline", "disabled"):
        return mode
    host = urlsplit(wandb_server()).netloc  # with the port, as in the netrc entries of wandb
    if not _has_key(host):
        logger.info("wandb: no key for %s; the run is kept offline.", host)
        return "offline"
    if not is_server_reachable():
        logger.warning("wandb: %s does not answer; the run is kept offline.", wandb_server())
        return "offline"
    return "online"


def wandb_server() -> str:
    """Return the URL of W&B or of a self-hosted server, which `wandb login --host` has saved."""
    url = os.environ.get("WANDB_BASE_URL") or _read_wandb_settings().get("base_url")
    return url or "https://api.wandb.ai"


def is_server_reachable() -> bool:
    """Whether the server gives any answer within `REACH_SECONDS`.

    The request runs in a thread, because the lookup of a host name has no timeout.
    """
    answers: list[bool] = []

    def request() -> None:
        try:
            urllib.request.urlopen(wandb_server(), timeout=REACH_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer, too
        except Exception:  # whatever the reason, the server cannot be reached
            return
        answers.append(True)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(answers)


def _read_wandb_settings() -> dict[str, str]:
    """Read wandb's settings files; those in the working directory override that of the user."""
    user_dir = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        files = [user_dir / "settings", Path("wandb/settings"), Path(".wandb/settings")]
        settings.read(files, encoding="utf-8")
    except (OSError, ValueError, configparser.Error):
        return {}  # wandb itself will report the error
    return dict(settings["default"]) if settings.has_section("default") else {}


def _has_key(host: str) -> bool:
    """Whether the environment or a netrc file has a W&B key for `host`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
