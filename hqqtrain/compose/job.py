"""One run of a sweep: the words that start it, and what it has left so far."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqtrain.common.secrets import mask_command
from hqqtrain.config.run import RunConfig


@dataclass(frozen=True)
class Job:
    """One combination: the words of its command line and the configuration they stand for."""

    words: list[str]
    config: RunConfig
    shared: tuple[str, ...] = ()
    """Words that the sweep adds, see `Sweep.of`."""

    @property
    def name(self) -> str:
        return self.config.run_name()

    @property
    def folder(self) -> Path:
        """The run directory, which two jobs share only if they mean the same."""
        return Path(self.config.run.root).expanduser() / self.name

    @property
    def command(self) -> list[str]:
        """All words, as `python -m hqqtrain` takes them; how many run at a time is the sweep's."""
        alone = [word for word in self.words if not word.startswith("launch.max_parallel_jobs=")]
        return [*alone, *self.shared]

    def __str__(self) -> str:
        """The words that the user knows."""
        return shlex.join(mask_command(self.words))

    def status(self) -> dict[str, Any]:
        """What its status.json says; empty where there is none."""
        return read_json(self.folder / "status.json")

    def summary(self) -> dict[str, Any]:
        """Its final figures; empty where there are none yet."""
        return read_json(self.folder / "summary.json")

    def figures(self) -> str:
        """`: 2.50 bits per weight, perplexity 9.100 quantized, 6.320 final`, as far as known."""
        summary = self.summary()
        bits = summary.get("quantize", {}).get("bits_per_weight")
        measured = summary.get("eval", {})
        parts = [] if bits is None else [f"{bits:.2f} bits per weight"]
        for name in ("full_precision", "quantized", "final"):
            if (perplexity := measured.get(name, {}).get("perplexity")) is not None:
                parts.append(f"perplexity {perplexity:.3f} {name.replace('_', ' ')}")
        return f": {', '.join(parts)}" if parts else ""

    def is_done(self) -> bool:
        """Whether nothing is left to do. Raises UserError where its inputs have changed since."""
        if self.status().get("status") != "done":
            return False
        from hqqtrain.rundir.directory import (
            RunDirectory,  # takes seconds, and a first sweep has no need
        )

        directory = RunDirectory(self.config)
        directory.check()
        return directory.done()


def read_json(file: Path) -> dict[str, Any]:
    """The object that `file` holds; empty where it is missing or holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
