"""The provenance of a result: package versions, source revision and digests of input files."""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hqqtrain.config import RunConfig

MADE_FROM = "made_from.json"
"""File next to a quantized model that records the digest of its source, see `made_from`."""

_PACKAGES = (
    "hqqtrain", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors",
    "bitsandbytes", "triton", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return name -> version of Python and of every installed package that affects results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the git commit of this checkout, with `-dirty` if edited; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def input_stamps(config: RunConfig) -> dict[str, str]:
    """Return config key -> `stamp` of the local files that the key names.

    A run's identity only contains their paths; these digests reveal that the files have changed.
    """
    keys = {
        "model.name_or_path": config.model.name_or_path,
        "adapter.init_from": config.adapter.init_from,
        "data.source": config.data.source,
        "eval.source": config.eval.source,
    }
    paths = {key: Path(value).expanduser() for key, value in keys.items() if value}
    return {key: stamp(path) for key, path in paths.items() if path.exists()}


def made_from(config: RunConfig) -> dict[str, str | None]:
    """Return the digest of the local source model, to detect later that the source has changed.

    The digest is stored in `MADE_FROM` next to the quantized model. It is None for models of the
    hub, which their name and revision identify.
    """
    key = "model.name_or_path"
    return {key: input_stamps(config).get(key)}


def stamp(path: Path) -> str:
    """Return the sha256, in hex, of the names, sizes and times of a file or a folder's files."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    facts = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
