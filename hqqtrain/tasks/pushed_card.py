"""The model cards of the results of a run: an adapter, a quantized model, an export."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hqqtrain.common.packed_folders import gguf_files
from hqqtrain.common.reading import read_json
from hqqtrain.formats.adapter_config import CONFIG
from hqqtrain.hub.card import HubCard
from hqqtrain.hub.license import license_of
from hqqtrain.hub.loading_text import how_to_load_adapter, how_to_load_export, how_to_load_model
from hqqtrain.rundir.schema import ExportMetrics, QuantizeMetrics
from hqqtrain.tasks.card_figures import card_metrics, describe_protocol
from hqqtrain.tasks.hints import vllm_options
from hqqtrain.tasks.pushed_run import PushedRun, without_folders

_LIBRARIES = {"mlx": "mlx", "gguf": "gguf"}
"""Export format -> the library that the Hub shows, if it is not transformers."""

_FORMAT_NAMES = {
    "packed": "packed weights of hqqtrain", "dense": "dense weights", "hqq": "weights of hqq",
    "mlx": "MLX", "humming": "humming, for vLLM and SGLang",
    "compressed-tensors": "compressed-tensors, for vLLM", "gguf": "GGUF, for llama.cpp",
}  # fmt: skip


def quantized_card(name: str, run: PushedRun) -> HubCard:
    """Return the card of the quantized model in the repository `name`."""
    summary = run.summary.quantize or QuantizeMetrics()
    bits = f"{summary.nbits} bits" if summary.nbits else "few bits"
    card = HubCard(
        name=name,
        summary=f"{_base_link(run, 'A model')}, quantized to {bits} per code with hqqtrain "
        "(Half-Quadratic Quantization). Adapters of hqqtrain are trained on exactly this base.",
        facts=_facts(run),
        loading=how_to_load_model(name),
        base=run.hub_base,
    )
    return _with_run(card, run, models=("full_precision", "quantized"))


def adapter_card(name: str, run: PushedRun, base: str, folder: Path) -> HubCard:
    """Return the card of the adapter in `folder`, whose base is in the repository `base`."""
    config, training = read_json(folder / CONFIG), run.summary.train
    is_quantized = run.summary.quantize is None or run.summary.quantize.nbits is not None
    alpha = str(config.get("lora_alpha")).removesuffix(".0")
    facts = {"adapter": f"LoRA, rank {config.get('r')}, alpha {alpha}"}
    if training and training.steps:
        facts["training"] = f"{training.steps:,} steps, {training.tokens or 0:,} tokens"
    is_source = base == run.hub_base  # the run has started from this base
    of_base = ""
    if is_quantized and not is_source and run.base:
        of_base = f", a quantized {_base_link(run)}"
    facts |= _facts(run, "base" if is_source else "full-precision model")
    facts = {"base": _linked(base, base)} | facts
    repairs = " It repairs the error of exactly that base." if is_quantized else ""
    card = HubCard(
        name=name,
        summary=f"LoRA adapter for {_linked(base, base)}{of_base}, trained with hqqtrain.{repairs}",
        facts=facts,
        loading=how_to_load_adapter(
            name, base, is_quantized=is_quantized,
            has_tokenizer=(folder / "tokenizer_config.json").is_file(),
            has_new_tokens=bool(config.get("trainable_token_indices")),
        ),
        base=base, relation="adapter", library="peft", tags=("lora",),
    )  # fmt: skip
    return _with_run(card, run)


def export_card(name: str, run: PushedRun, folder: Path) -> HubCard:
    """Return the card of an export in `folder`."""
    export = run.summary.export or ExportMetrics()
    export_format = export.format or "dense"
    forms = {"merge": "merged into the weights", "separate": "separate, beside the model"}
    quantize = run.summary.quantize
    how = "quantized with hqqtrain (Half-Quadratic Quantization)"
    if quantize is not None and quantize.nbits is None:
        how = "fine-tuned with hqqtrain"
    facts = {"format": _FORMAT_NAMES[export_format]}
    if export.adapter_form in forms:
        facts["adapter"] = forms[export.adapter_form]
    merges = export_format == "dense" and export.adapter_form == "merge"
    files = gguf_files(folder) if export_format == "gguf" else []
    card = HubCard(
        name=name,
        summary=f"{_base_link(run, 'A model')}, {how}, and exported as "
        f"{_FORMAT_NAMES[export_format]}.",
        facts=facts | _facts(run) | _export_facts(export),
        loading=how_to_load_export(
            name, export_format, has_adapter=export.adapter_form == "separate",
            file=files[0].name if files else "",
            vllm_options=vllm_options(folder / "adapter", "model/adapter"),
        ),
        base=run.hub_base, relation="finetune" if merges else "quantized",
        library=_LIBRARIES.get(export_format, "transformers"),
        tags=(export_format,),
    )  # fmt: skip
    return _with_run(card, run)


def _with_run(card: HubCard, run: PushedRun, models: tuple[str, ...] = ()) -> HubCard:
    """Return a card with the figures, the commands and the license.

    Args:
        card: The card.
        run: The run.
        models: The models whose figures it shows, keys of `MODEL_NAMES`; by default all.
    """
    summary = run.evaluated
    if models and summary.eval:
        others = {key: None for key in summary.measured_models() if key not in models}
        summary = replace(summary, eval=replace(summary.eval, **others))
    figures = card_metrics(summary)
    return replace(
        card,
        figures={name: f"{value:.4g}" for name, value in figures.items()},
        measured_by=without_folders(describe_protocol(summary)) if figures else "",
        command="\n".join(run.commands),
        versions=run.versions,
        license=license_of(run.local_base, run.hub_base),
        of_base=_base_link(run, f"`{card.base}`" if card.base else "whose name is not recorded"),
    )


def _facts(run: PushedRun, name: str = "base") -> dict[str, str]:
    """Return the base, the bits and the fingerprint, as far as they are known."""
    revision = f" at revision `{run.revision}`" if run.revision else ""
    facts = {name: f"{_base_link(run)}{revision}"} if run.base else {}
    quantize = run.summary.quantize
    if quantize is None:
        return facts
    if quantize.nbits is not None:
        facts["bits"] = _describe_bits(quantize)
    if quantize.bits_per_weight is not None:
        facts["bits per weight"] = f"{quantize.bits_per_weight:.2f}, scales and zeros counted"
    if quantize.relative_error:
        facts["relative error of the weights"] = f"{quantize.relative_error:.4g}"
    if quantize.fingerprint:
        facts["fingerprint"] = f"`{quantize.fingerprint}`"
    return facts


def _describe_bits(quantize: QuantizeMetrics) -> str:
    groups = f"groups of {quantize.group_size}" if quantize.group_size else "whole rows or columns"
    text = f"{quantize.nbits}, {groups}, axis {quantize.axis}, solver `{quantize.solver}`"
    if quantize.calibration is None:
        return text
    source = without_folders(quantize.calibration)
    return f"{text}, calibrated on {quantize.calibration_tokens:,} tokens of `{source}`"


def _export_facts(export: ExportMetrics) -> dict[str, str]:
    """Return how far the export is from the quantized model."""
    values: Mapping[str, Any] = {
        "bits per weight of the export": export.bits_per_weight,
        "largest error of the export, in steps": export.max_error,
        "KL of the export to the quantized model": export.kl,
    }
    return {name: f"{value:.4g}" for name, value in values.items() if value is not None}


def _base_link(run: PushedRun, otherwise: str = "") -> str:
    """Return the full-precision model as Markdown; `otherwise` if it is not known."""
    return _linked(run.base, run.hub_base) if run.base else otherwise


def _linked(name: str, hub_name: str | None) -> str:
    """Return a model's name as Markdown, with a link if it is on the Hub."""
    return f"[{name}](https://huggingface.co/{hub_name})" if hub_name else f"`{name}`"
