"""The config group of the model, with the help text of every key."""

from dataclasses import dataclass

from hqqtrain.config.field import key


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model and the source of its weights."""

    name_or_path: str = key(
        "tiny", "hub name, local folder, a run's folder or its quantized/, or the bundled 'tiny'"
    )
    revision: str | None = key(None, "branch, tag or commit of a model on the hub")
    source: str = key(
        "pretrained",
        "where weights come from; synthetic: random weights of the model's shapes, generated on "
        "the fly, to try any model size without a download",
        choices=("pretrained", "synthetic"),
    )
