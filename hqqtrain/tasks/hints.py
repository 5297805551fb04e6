"""Say at the end of a run how to use its results, in commands that can be pasted."""

import re
import shlex
import shutil
import sys
from pathlib import Path

from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import ExportMetrics, Summary


def usage_hints(summary: Summary, layout: RunLayout) -> list[str]:
    """Return lines that say how to use what a run has exported or trained."""
    if summary.export is not None:
        return [_export_hint(summary.export, layout.export)]
    has_base = layout.has_quantized or (summary.quantize and summary.quantize.nbits is None)
    if summary.train is not None and layout.has_adapter and has_base:
        python = "python" if shutil.which("python") == sys.executable else sys.executable
        program, model = f"{shlex.quote(python)} -m hqqtrain", _model_argument(layout.folder)
        return [
            f"try it on a terminal: {program} task=generate {model}",
            f"merge the adapter into a model that any tool can load: {program} task=export {model}",
        ]
    return []


def _export_hint(export: ExportMetrics, folder: Path) -> str:
    """Return how to load what was exported."""
    path = shlex.quote(str(folder))
    adapter = path + "/adapter" if export.adapter_form == "separate" else ""
    served = f" --enable-lora --lora-modules trained={adapter}" if adapter else ""
    hints = {
        "packed": f"use it: {_model_argument(folder)}",
        "hqq": "load it with transformers 4.57 and hqq: "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        "mlx": f"run it: mlx_lm.generate --model {path}"
        + (f" --adapter-path {adapter}" if adapter else "") + " --prompt ...",
        "humming": f"serve it: vllm serve {path}{served}",
        "compressed-tensors": f"serve it: vllm serve {path}{served}",
    }  # fmt: skip
    if export.format == "gguf":
        files = [file for file in sorted(folder.glob("*.gguf")) if file.name != "adapter.gguf"]
        lora = f" --lora {shlex.quote(str(folder / 'adapter.gguf'))}" if adapter else ""
        return f"run it: llama-cli -m {shlex.quote(str(files[0] if files else folder))}{lora}"
    dense = f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    return hints.get(export.format or "", dense)


def _model_argument(folder: Path) -> str:
    """Return the argument that selects a model, quoted for Hydra and for a shell."""
    path = str(folder)
    # A word without a slash may be another value: null, true, 1e5.
    if "/" not in path or not re.fullmatch(r"[A-Za-z0-9_./+@-]+", path):
        # Hydra reads backslashes as such only where none of these follows.
        path = re.sub(r"(\\*)('|\$\{)", r"\1\1\\\2", path)
        path = "'" + re.sub(r"(\\+)\Z", r"\1\1", path) + "'"
    return shlex.quote(f"model.name_or_path={path}")
