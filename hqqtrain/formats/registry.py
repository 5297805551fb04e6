"""The formats of `export.format`, by name.

To add a format, write its file in `targets/`, register it here, and add its name to
`hqqtrain.config.export.EXPORT_FORMATS`, which the command line reads without torch.
"""

from transformers import PretrainedConfig

from hqqtrain.common.errors import UserError
from hqqtrain.config.export import ExportConfig
from hqqtrain.formats.base import ExportFormat
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.formats.targets.compressed_tensors import CompressedTensorsFormat
from hqqtrain.formats.targets.dense import DenseFormat
from hqqtrain.formats.targets.gguf import GgufFormat
from hqqtrain.formats.targets.hqq import HqqFormat
from hqqtrain.formats.targets.humming import HummingFormat
from hqqtrain.formats.targets.mlx import MlxFormat
from hqqtrain.formats.targets.packed import PackedFormat

FORMATS: dict[str, ExportFormat] = {
    format.name: format
    for format in (
        DenseFormat(),
        PackedFormat(),
        HqqFormat(),
        MlxFormat(),
        HummingFormat(),
        CompressedTensorsFormat(),
        GgufFormat(),
    )
}
"""The formats, by the values of `export.format`."""


def check_format(
    name: str,
    settings: QuantizedSettings,
    hf_config: PretrainedConfig,
    config: ExportConfig | None = None,
) -> None:
    """Check that the format `name` can hold a model with these settings.

    Args:
        name: The name of the format.
        settings: The settings of the quantized model.
        hf_config: Its configuration.
        config: The keys of the export; None: the defaults.

    Raises:
        UserError: It cannot. The message names the formats that can.
    """
    chosen = FORMATS[name].configured(config or ExportConfig())
    reasons = _refusals(chosen, settings, hf_config)
    if not reasons:
        return
    others = [other for other in FORMATS if not _refusals(FORMATS[other], settings, hf_config)]
    raise UserError(
        f"export.format={name}: {'; '.join(reasons)}. Use {', '.join(others)}, or quantize with "
        "other settings."
    )


def _refusals(
    export_format: ExportFormat, settings: QuantizedSettings, hf_config: PretrainedConfig
) -> list[str]:
    """Return why the format cannot hold a model with these settings."""
    if not settings.modules and not export_format.holds_dense:
        return ["the model has no quantized layers (quant.nbits=null)"]
    return list(export_format.refusals(settings, hf_config))
