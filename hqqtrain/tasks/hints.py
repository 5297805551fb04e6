"""Say at the end of a run how to use its results, in commands that can be pasted."""

import re
import shlex
import shutil
import sys
from pathlib import Path

from hqqtrain.common.packed_folders import GGUF_ADAPTER, gguf_files
from hqqtrain.common.reading import read_json
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import ExportMetrics, Summary

_VLLM_DEFAULT_RANK = 16
"""The largest rank of an adapter that vLLM loads without `--max-lora-rank`."""

_VLLM_RANKS = (32, 64, 128, 256, 320, 512)
"""The larger values of `--max-lora-rank` that vLLM allows."""


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
    """Return how to load what was exported, with its adapter."""
    path, separate = shlex.quote(str(folder)), export.adapter_form == "separate"
    adapter = shlex.quote(str(folder / "adapter")) if separate else ""
    if export.format == "gguf":
        files = gguf_files(folder)
        lora = f" --lora {shlex.quote(str(folder / GGUF_ADAPTER))}" if adapter else ""
        return f"run it: llama-cli -m {shlex.quote(str(files[0] if files else folder))}{lora}"
    if export.format == "packed":
        init_from = f" {_argument('adapter.init_from', folder / 'adapter')}" if adapter else ""
        return f"use it: {_model_argument(folder)}{init_from}"
    if export.format == "mlx":
        option = f" --adapter-path {adapter}" if adapter else ""
        return f"run it: mlx_lm.generate --model {path}{option} --prompt ..."
    if export.format in ("humming", "compressed-tensors"):
        options = vllm_options(folder / "adapter", adapter) if adapter else ""
        return f"serve it: vllm serve {path}{options}"
    programs = " with transformers 4.57 and hqq" if export.format == "hqq" else ""
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    if adapter:
        load = f"peft.PeftModel.from_pretrained({load}, {str(folder / 'adapter')!r})"
    return f"load it{programs}: {load}"


def vllm_options(adapter: Path, shown: str) -> str:
    """Return the options of `vllm serve` for an adapter, whose rank is at most 16 by default.

    Args:
        adapter: The folder of the adapter.
        shown: How the command names it.
    """
    config = read_json(adapter / "adapter_config.json")
    largest = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    allowed = next((rank for rank in _VLLM_RANKS if rank >= largest), largest)
    rank = f" --max-lora-rank {allowed}" if largest > _VLLM_DEFAULT_RANK else ""
    return f" --enable-lora{rank} --lora-modules trained={shown}"


def _model_argument(folder: Path) -> str:
    """Return the argument that selects a model, quoted for Hydra and for a shell."""
    return _argument("model.name_or_path", folder)


def _argument(key: str, folder: Path) -> str:
    """Return the argument that sets `key` to a folder, quoted for Hydra and for a shell."""
    path = str(folder)
    # A word without a slash may be another value: null, true, 1e5.
    if "/" not in path or not re.fullmatch(r"[A-Za-z0-9_./+@-]+", path):
        # Hydra reads backslashes as such only where none of these follows.
        path = re.sub(r"(\\*)('|\$\{)", r"\1\1\\\2", path)
        path = "'" + re.sub(r"(\\+)\Z", r"\1\1", path) + "'"
    return shlex.quote(f"{key}={path}")
