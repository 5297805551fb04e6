"""The config group of pushing results to the Hugging Face Hub, with the help text of every key."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hqqtrain.config.field import key

PUSHING_TASKS = ("finetune", "quantize", "export")
"""The tasks whose results can be pushed."""

_MAX_LENGTH = 96
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))[\w][\w.-]*/[\w][\w.-]*(?<!\.git)(?<![.-])", re.ASCII)


@dataclass(kw_only=True, slots=True)
class HubConfig:
    """The repositories that get the results of a run. Nothing is pushed without `push`."""

    push: str | None = key(
        None,
        "repository, user/name, that gets the adapter, the quantized model or the export with a "
        "model card, after the run; null: nothing is pushed",
    )
    private: bool = key(True, "whether a new repository is private")
    base: str | None = key(
        None,
        "repository of the base that a pushed adapter names; null: that of hub.push with -base at "
        "the end, which gets quantized/",
    )

    @property
    def base_repository(self) -> str:
        """The repository of the quantized base of an adapter."""
        return self.base or f"{self.push}-base"

    def errors(self) -> Iterator[str]:
        """Yield one message for every value that is not allowed, and every combination."""
        for name in ("push", "base"):
            value = getattr(self, name)
            if value is not None and (error := repository_name_error(value)):
                yield f"hub.{name}={value}: {error}"
        if self.push is not None and self.base == self.push:
            yield (
                f"hub.base={self.base}: must not be the repository of hub.push, which gets the "
                "adapter; loaders find one model in a repository."
            )


def repository_name_error(name: str) -> str | None:
    """Return why the Hub has no repository of this name; None if it may have one."""
    if "/" not in name:
        return "needs the user or organization, as in user/name."
    if not _REPOSITORY.fullmatch(name) or len(name) > _MAX_LENGTH:
        return (
            f"must be user/name: letters, digits, '-', '_' and '.', at most {_MAX_LENGTH} "
            "characters, without '--' and '..', and no .git at the end."
        )
    return None
