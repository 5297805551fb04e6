"""The license of a base model, as its own model card states it."""

from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from hqqtrain.formats.signed_card import CARD
from hqqtrain.hub.card import CARD_ERRORS

_KEYS = ("license", "license_name", "license_link")


def license_of(folder: Path | None, name: str | None) -> dict[str, str]:
    """Return the keys of a model's card that state its license; empty if it cannot be found.

    Args:
        folder: The folder of the model, if it is on this machine.
        name: The name of the model on the Hub, if it is there.
    """
    try:
        if folder and (folder / CARD).is_file():
            text = (folder / CARD).read_text("utf-8", errors="replace")
            data = ModelCard(text, ignore_metadata_errors=True).data
        elif name and (found := HfApi().model_info(name).card_data):
            data = found
        else:
            return {}
    except (OSError, HTTPError, *CARD_ERRORS):
        return {}
    values = data.to_dict()
    license = values.get("license")
    if not isinstance(license, str) or license == "unknown":
        return {}
    return {key: values[key] for key in _KEYS if isinstance(values.get(key), str)}
