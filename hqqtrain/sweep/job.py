"""One run of a sweep: the overrides that start it, and the results it has written so far."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqtrain.config import RunConfig
from hqqtrain.config.secrets import masked_command


@dataclass(frozen=True)
class Job:
    """One combination of a sweep: its command-line overrides and the configuration they compose."""

    words: list[str]
    config: RunConfig
    shared: tuple[str, ...] = ()
    """Overrides that the sweep adds, see `Sweep.of`."""

    @property
    def name(self) -> str:
        return self.config.run_name()

    @property
    def folder(self) -> Path:
        """The run directory. Two jobs share one only if their configurations are the same."""
        return Path(self.config.run.root).expanduser() / self.name

    @property
    def command(self) -> list[str]:
        """All arguments of `python -m hqqtrain` for this job.

        `launch.jobs` is left out, because it belongs to the sweep and not to a single run.
        """
        own = [word for word in self.words if not word.startswith("launch.jobs=")]
        return [*own, *self.shared]

    def __str__(self) -> str:
        """The overrides as the user wrote them, with secrets masked."""
        return shlex.join(masked_command(self.words))

    def status(self) -> dict[str, Any]:
        """Return the content of status.json; empty if there is no such file."""
        return read_json(self.folder / "status.json")

    def summary(self) -> dict[str, Any]:
        """Return the final figures of summary.json; empty if there are none yet."""
        return read_json(self.folder / "summary.json")

    def figures(self) -> str:
        """Format the key figures that are known so far; an empty string if none is.

        For example `: 2.50 bits per weight, perplexity 9.100 quantized, perplexity 6.320 final`.
        """
        summary = self.summary()
        bits = summary.get("quantize", {}).get("bits_per_weight")
        measured = summary.get("eval", {})
        parts = [] if bits is None else [f"{bits:.2f} bits per weight"]
        for name in ("full_precision", "quantized", "final"):
            if (perplexity := measured.get(name, {}).get("perplexity")) is not None:
                parts.append(f"perplexity {perplexity:.3f} {name.replace('_', ' ')}")
        return f": {', '.join(parts)}" if parts else ""

    def is_done(self) -> bool:
        """Whether the run has finished and nothing is left to do.

        Raises:
            UserError: the inputs of the finished run have changed since.
        """
        if self.status().get("status") != "done":
            return False
        from hqqtrain.ckpt import RunDirectory  # slow import; a first sweep has no finished jobs

        directory = RunDirectory(self.config)
        directory.check()
        return directory.done()


def read_json(file: Path) -> dict[str, Any]:
    """Load a JSON object from `file`; empty if the file is missing or contains no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
