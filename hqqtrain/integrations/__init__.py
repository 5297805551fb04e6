"""Extensions of transformers and PEFT.

This module imports neither them nor torch: an extension is imported after its library.
"""

from hqqtrain.common.after_import import after_import
from hqqtrain.integrations.adapters import (
    extend_hotswap,
    extend_peft_config,
    extend_peft_model,
    extend_pretrained_model,
    extend_transformers,
)
from hqqtrain.integrations.auto_classes import extend_auto_class
from hqqtrain.integrations.hqq_checkpoints import extend_hqq_quantizer


def register() -> None:
    """Extend transformers and PEFT when they are imported, or now if they have been."""
    after_import("transformers.quantizers.auto", _register_quantizer)
    after_import("transformers.quantizers.quantizer_hqq", extend_hqq_quantizer)
    after_import("transformers.models.auto.modeling_auto", extend_auto_class)
    after_import("transformers.integrations.peft", extend_transformers)
    after_import("transformers.modeling_utils", extend_pretrained_model)
    after_import("peft.tuners.lora.model", _extend_lora)
    after_import("peft.config", extend_peft_config)
    after_import("peft.peft_model", extend_peft_model)
    after_import("peft.utils.hotswap", extend_hotswap)


def _register_quantizer() -> None:
    import hqqtrain.integrations.transformers  # noqa: F401  # it registers its classes


def _extend_lora() -> None:
    from hqqtrain.integrations.peft import extend_peft

    extend_peft()
