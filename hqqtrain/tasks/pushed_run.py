"""The facts of a run for the model cards of its results, without the paths of this machine."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqqtrain.common.secrets import mask_command
from hqqtrain.config.run import NON_RESULT_GROUPS
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import Summary, read_summary
from hqqtrain.rundir.yaml_file import read_yaml

_BUNDLED = "tiny"

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)

_PATH = re.compile(
    r"""(?<![\w./~-])(?:file:/*|~|\.{1,2}|/(?=[^/\s]))[^\s,;:'"\[\]{}]*/(?=[^\s,;'"\]}]*)"""
)
"""Matches the folders of a path within a value, up to its last slash."""

_RELATIVE = re.compile(r"(?<![\w./~-])(?<!:/)[\w.-]+(?:/[\w.-]+)+")
"""Matches what may be a relative path, or a name of the Hub."""

_MAX_RUNS = 8
"""Runs that are followed from a result back to its full-precision model."""

_PROGRAMS = ("hqqtrain", "torch", "transformers", "peft")


@dataclass(frozen=True)
class PushedRun:
    """The facts that the directory of a run records.

    Attributes:
        settings: The content of config.yaml; empty if there is no run.
        summary: The content of summary.json.
        source: The run whose model this one has used; None if it started from a model.
    """

    settings: Mapping[str, Any]
    summary: Summary
    source: "PushedRun | None" = None

    @classmethod
    def read(cls, folder: Path, depth: int = 0) -> "PushedRun":
        """Return what the run in `folder` records.

        Raises:
            UserError: Its config.yaml is damaged.
        """
        layout = RunLayout(folder)
        run = cls(read_yaml(layout.config_yaml), read_summary(layout.summary_json))
        source = _run_folder(run._model) if depth < _MAX_RUNS else None
        return (
            run if source is None else cls(run.settings, run.summary, cls.read(source, depth + 1))
        )

    @property
    def base(self) -> str:
        """The full-precision model: its name on the Hub, or the last part of its path; or empty."""
        if self.source:
            return self.source.base
        return self.hub_base or Path(self._model).name

    @property
    def hub_base(self) -> str | None:
        """The name of the full-precision model on the Hub; None if it is not there."""
        return self.source.hub_base if self.source else hub_name(self._group("model"))

    @property
    def revision(self) -> str | None:
        """The revision of the full-precision model that was given."""
        return self.source.revision if self.source else self._group("model").get("revision")

    @property
    def local_base(self) -> Path | None:
        """The folder of the full-precision model, if it is on this machine."""
        if self.source:
            return self.source.local_base
        folder = Path(self._model).expanduser()
        return folder if self._model != _BUNDLED and folder.is_dir() else None

    @property
    def commands(self) -> list[str]:
        """The commands of all runs that led to the result, for a shell, without paths."""
        earlier = self.source.commands if self.source else []
        command = self.settings.get("command")
        return [*earlier, _shown_command(command)] if isinstance(command, list) else earlier

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the most important programs."""
        versions = self._group("versions")
        return {name: str(versions[name]) for name in _PROGRAMS if name in versions}

    @property
    def evaluated(self) -> Summary:
        """The summary with the evaluations: of this run, or of the one that it started from."""
        has_none = self.summary.eval is None and self.source is not None
        return self.source.evaluated if has_none and self.source else self.summary

    @property
    def paths(self) -> list[str]:
        """The paths of this machine that the run has used, which no pushed file may contain."""
        own = [text for text in _texts(self.settings) if text.startswith(("/", "~"))]
        return own + (self.source.paths if self.source else [])

    @property
    def _model(self) -> str:
        return str(self._group("model").get("name_or_path") or "")

    def _group(self, name: str) -> Mapping[str, Any]:
        group = self.settings.get(name)
        return group if isinstance(group, dict) else {}


def hub_name(model: Mapping[str, Any]) -> str | None:
    """Return the name on the Hub of a model, given the group `model`; None if it is elsewhere."""
    name = str(model.get("name_or_path") or "")
    is_elsewhere = (
        model.get("source") == "synthetic"
        or name == _BUNDLED
        or os.path.exists(os.path.expanduser(name))
    )
    return None if is_elsewhere or not _HUB_NAME.fullmatch(name) else name


def without_folders(text: str) -> str:
    """Return a text in which the folders of each path are replaced by `...`.

    A relative path has the form of a name on the Hub, so it is one if it exists.
    """

    def shown(match: re.Match[str]) -> str:
        return f".../{Path(match[0]).name}" if os.path.exists(match[0]) else match[0]

    return _PATH.sub(".../", _RELATIVE.sub(shown, text))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value of config.yaml."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _shown_command(words: list[Any]) -> str:
    """Return a command without the keys that do not change the result, and without folders."""
    shown = []
    for word in mask_command([str(word) for word in words]):
        key, equals, value = word.partition("=")
        if key.partition(".")[0] in (*NON_RESULT_GROUPS, "hub") and key != "recipe":
            continue
        is_path = os.path.isabs(os.path.expanduser(value))
        value = f".../{Path(value).name}" if is_path and " " in value else without_folders(value)
        shown.append(shlex.quote(f"{key}{equals}{value}"))
    return " ".join(shown)


def _run_folder(name: str) -> Path | None:
    """Return the run that a model's name is, by its folder or one in it; None if it is none."""
    folder = Path(name).expanduser()
    is_folder = name not in ("", _BUNDLED) and folder.is_dir()
    for candidate in (folder, folder.resolve().parent) if is_folder else ():
        if RunLayout(candidate).config_yaml.is_file():
            return candidate
    return None
