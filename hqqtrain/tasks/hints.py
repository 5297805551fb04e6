"""Say at the end of a run how to use its results, in commands that can be pasted."""

import re
import shlex
import shutil
import sys
from pathlib import Path

from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import Summary


def usage_hints(summary: Summary, layout: RunLayout) -> list[str]:
    """Return lines that say how to use what a run has exported or trained."""
    if summary.export is not None and summary.export.format == "dense":
        folder = str(layout.export)
        return [f"load it: transformers.AutoModelForCausalLM.from_pretrained({folder!r})"]
    if summary.export is not None:
        return [f"use it: {_model_argument(layout.export)}"]
    has_base = layout.has_quantized or (summary.quantize and summary.quantize.nbits is None)
    if summary.train is not None and layout.has_adapter and has_base:
        python = "python" if shutil.which("python") == sys.executable else sys.executable
        command = f"{shlex.quote(python)} -m hqqtrain task=export {_model_argument(layout.folder)}"
        return [f"merge the adapter into a model that any tool can load: {command}"]
    return []


def _model_argument(folder: Path) -> str:
    """Return the argument that selects a model, quoted for Hydra and for a shell."""
    path = str(folder)
    # A word without a slash may be another value: null, true, 1e5.
    if "/" not in path or not re.fullmatch(r"[A-Za-z0-9_./+@-]+", path):
        # Hydra reads backslashes as such only where none of these follows.
        path = re.sub(r"(\\*)('|\$\{)", r"\1\1\\\2", path)
        path = "'" + re.sub(r"(\\+)\Z", r"\1\1", path) + "'"
    return shlex.quote(f"model.name_or_path={path}")
