"""Extensions of transformers and PEFT.

This module imports neither them nor torch: an extension is imported after its library.
"""

from hqqtrain.common.after_import import after_import


def register() -> None:
    """Extend transformers and PEFT when they are imported, or now if they have been."""
    after_import("transformers.quantizers.auto", _extend_transformers)
    after_import("peft.tuners.lora.model", _extend_peft)


def _extend_transformers() -> None:
    import hqqtrain.integrations.transformers  # noqa: F401  # it registers its classes


def _extend_peft() -> None:
    from hqqtrain.integrations.peft import extend_peft

    extend_peft()
