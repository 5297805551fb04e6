"""The linears that inference engines fuse: they become one, so their settings must be the same.

vLLM and SGLang compute q, k and v with one linear, and gate and up with another, and look their
settings up by the name of the fused linear.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig

from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.models.build import build_meta

FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""The last part of a linear's name -> that of the fused linear."""


def engine_name(name: str) -> str:
    """Return the name under which vLLM looks up the settings of the linear `name`."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{FUSED[last]}" if last in FUSED else name


def dense_linears(settings: QuantizedSettings, hf_config: PretrainedConfig) -> list[str]:
    """Return the names of the linears that are not quantized."""
    model = build_meta(hf_config)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name not in settings.modules]


def differing_linears(
    settings: QuantizedSettings, hf_config: PretrainedConfig
) -> Iterator[tuple[str, str]]:
    """Yield pairs of linears that are fused, although their settings differ, or one is dense."""
    found: dict[str, tuple[str, object]] = {}
    for name in [*settings.modules, *dense_linears(settings, hf_config)]:
        module = settings.modules.get(name)
        setting = (module.nbits, module.group_size) if module else None
        first, expected = found.setdefault(engine_name(name), (name, setting))
        if setting != expected:
            yield first, name
