"""Whether a run can speak to W&B: a key, a network, and a server that answers, within seconds."""

import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

REACH_SECONDS = 3.0


def mode() -> Any:
    """`online` or `offline`, or what the user has decided by WANDB_MODE or WANDB_DISABLED."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    if not _has_key(urlsplit(server()).hostname or ""):
        return "offline"
    if not reachable():
        logger.warning("wandb: %s does not answer; the run is kept offline.", server())
        return "offline"
    return "online"


def server() -> str:
    """The URL of W&B, or of a server of one's own."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def reachable() -> bool:
    """True where the server answers anything in time; a thread, for name lookup has no limit."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(server(), timeout=REACH_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer nonetheless
        except Exception:  # whatever it is, nobody waits for it any more
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(answers)


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
