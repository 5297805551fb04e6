"""Whether a run can speak to W&B: a key, a network, and a server that answers, within seconds."""

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


def wandb_mode() -> Any:
    """`online` or `offline`, or what the user has decided: WANDB_MODE, WANDB_DISABLED, `wandb
    offline`. Says why a run is offline."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    if (chosen := _settings().get("mode")) in ("offline", "disabled"):
        return chosen
    host = urlsplit(wandb_server()).netloc  # with the port, as wandb keeps keys
    if not _has_key(host):
        logger.info("wandb: no key for %s; the run is kept offline.", host)
        return "offline"
    if not is_server_reachable():
        logger.warning("wandb: %s does not answer; the run is kept offline.", wandb_server())
        return "offline"
    return "online"


def wandb_server() -> str:
    """The URL of W&B, or of a server of one's own; `wandb login --host` keeps it in a file."""
    chosen = os.environ.get("WANDB_BASE_URL") or _settings().get("base_url")
    return chosen or "https://api.wandb.ai"


def is_server_reachable() -> bool:
    """True where the server answers anything in time; a thread, for name lookup has no limit."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(wandb_server(), timeout=REACH_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer nonetheless
        except Exception:  # whatever it is, nobody waits for it any more
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(answers)


def _settings() -> dict[str, str]:
    """What wandb's settings files say: the user's, and over it that of the working directory."""
    own = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    files = configparser.ConfigParser(interpolation=None)
    try:
        files.read([own / "settings", "wandb/settings", ".wandb/settings"], encoding="utf-8")
    except (OSError, ValueError, configparser.Error):
        return {}  # wandb says what is wrong with them
    return dict(files["default"]) if files.has_section("default") else {}


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
