"""The model card of a repository: its metadata for the Hub, and what its readers need to know."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from hqqtrain.formats.signed_card import signed_card

TAG = "hqqtrain"

CARD_ERRORS = (ValueError, TypeError, YAMLError, RecursionError)
"""Errors of reading a card whose metadata are damaged, or of other types."""


@dataclass(frozen=True)
class HubCard:
    """The content of a model card.

    Attributes:
        name: `user/name`, the repository.
        summary: The first paragraph, as Markdown.
        facts: Name -> value of the rows of the first table, as Markdown.
        loading: How to load the model, as Markdown.
        figures: Name -> value of the results.
        measured_by: The text and the protocol of the figures; empty if there are none.
        command: The command that has made the model; empty if it is not known.
        versions: The versions of the programs that have made it.
        base: The repository of the base model; None if it is not on the Hub.
        relation: The relation to it: `quantized` or `adapter`.
        library: The library that loads the model.
        tags: Further tags.
        license: The license of the base, and the keys of the Hub that go with it.
        of_base: The model whose license it is.
    """

    name: str
    summary: str
    facts: Mapping[str, str]
    loading: str
    figures: Mapping[str, str] = field(default_factory=dict)
    measured_by: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    base: str | None = None
    relation: str = "quantized"
    library: str = "transformers"
    tags: Sequence[str] = ()
    license: Mapping[str, str] = field(default_factory=dict)
    of_base: str = ""

    def render(self) -> str:
        """Return the card, with its metadata and its checksum."""
        relation = {"base_model": self.base, "base_model_relation": self.relation}
        metadata: dict[str, Any] = {
            "library_name": self.library,
            "pipeline_tag": "text-generation",
            "tags": sorted({TAG, "hqq", *self.tags}),
            **(relation if self.base else {}),
            **self.license,
        }
        parts = [
            f"# {self.name.partition('/')[2]}",
            self.summary,
            *([_table(("", ""), self.facts)] if self.facts else []),
            *self._results(),
            "## How to load it",
            self.loading,
            *self._origin(),
            "## License",
            self._license_sentence(),
        ]
        yaml = ModelCardData(**metadata).to_yaml()
        text = f"---\n{yaml}\n---\n\n" + "\n\n".join(parts) + "\n\n"
        return signed_card(text)

    def _results(self) -> list[str]:
        if not self.figures:
            return []
        measured = [f"Measured on {self.measured_by}."] if self.measured_by else []
        return ["## Results", _table(("figure", "value"), self.figures), *measured]

    def _origin(self) -> list[str]:
        parts = [f"```bash\n{self.command}\n```"] if self.command else []
        if self.versions:
            shown = ", ".join(f"{name} {version}" for name, version in self.versions.items())
            parts.append(f"Made with {shown}.")
        return ["## How it was made", *parts] if parts else []

    def _license_sentence(self) -> str:
        if self.license:
            return f"The license is that of the base model, {self.of_base}."
        return (
            f"The license of the base model, {self.of_base}, applies. It is not stated here, "
            "because it was not found when this card was written."
        )


def is_of_hqqtrain(text: str) -> bool:
    """Whether a card, edited or not, has the tag that hqqtrain gives to its repositories."""
    try:
        metadata = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
        return TAG in (metadata.get("tags") or ())
    except CARD_ERRORS:
        return False


def _table(titles: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {titles[0]} | {titles[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
