"""Where a result comes from: versions of everything, and the revision of the source code."""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hqqtrain.config.run import RunConfig

MADE_FROM = "made_from.json"

_PACKAGES = (
    "hqqtrain", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors",
    "bitsandbytes", "triton", "numpy",
)  # fmt: skip


def package_versions() -> dict[str, str]:
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


def input_digests(config: RunConfig) -> dict[str, str]:
    """Key -> digest of the sizes and times of the local files that the key names.

    A run's identity knows their path only; this tells when something else lies there.
    """
    keys = {
        "model.name_or_path": config.model.name_or_path,
        "adapter.init_from": config.adapter.init_from,
        "data.source": config.data.source,
        "eval.source": config.eval.source,
    }
    paths = {key: Path(value).expanduser() for key, value in keys.items() if value}
    return {key: stat_digest(path) for key, path in paths.items() if path.exists()}


def source_digest(config: RunConfig) -> dict[str, str | None]:
    """What a quantized model lies beside, in MADE_FROM, to be known again by: its source's digest;
    none for what is not a local folder, which its name tells."""
    key = "model.name_or_path"
    return {key: input_digests(config).get(key)}


def stat_digest(path: Path) -> str:
    """sha256, in hex, of the names, sizes and times of a file, or of all files of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    facts = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
