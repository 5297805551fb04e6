"""The config group of task=export, with the help text of every key."""

from dataclasses import dataclass

from hqqtrain.config.field import key

EXPORT_FORMATS = ("dense", "packed")
"""The names of the registry of export formats, which imports torch. A test compares them."""


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """The format that task=export writes."""

    format: str = key(
        "dense",
        "dense: a Hugging Face checkpoint, weights dequantized and adapter merged; packed: the "
        "quantized base, as in a run's quantized/, without an adapter",
        choices=EXPORT_FORMATS,
    )
