"""Where a result comes from: versions of everything, and the revision of the source code."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "hqqtrain", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors",
    "bitsandbytes", "triton", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Name -> version of Python and of every package that shapes a result, where installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout this code runs from, `-dirty` where it was edited; else None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
