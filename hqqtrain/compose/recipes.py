"""Where recipes live: `recipe=NAME` is NAME.yaml in one of these folders, the first that has it.

A user's own folder is looked at before ours, so that a project can keep, extend or replace
recipes without touching the installed package.
"""

import os
from pathlib import Path

VARIABLE = "HQQTRAIN_RECIPES"


def recipe_dirs() -> list[tuple[str, Path]]:
    """(who provides it, folder): $HQQTRAIN_RECIPES, ./recipes, then the built-in ones."""
    listed = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    found = [(VARIABLE, folder) for folder in listed]
    found += [("cwd", Path("recipes")), ("hqqtrain", _builtin())]
    unique = {folder.resolve(): provider for provider, folder in reversed(found)}
    return [(provider, folder) for folder, provider in reversed(unique.items()) if folder.is_dir()]


def recipe_files() -> dict[str, Path]:
    """Every recipe by name; of two with one name, the one that `recipe=` takes."""
    files: dict[str, Path] = {}
    for _, folder in recipe_dirs():
        for file in sorted(folder.glob("*.yaml")):
            files.setdefault(file.stem, file)
    return files


def recipe_description(file: Path) -> str:
    """The one-line comment a recipe starts with, without the `#`; empty where it has none."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


def _builtin() -> Path:
    """`hqqtrain/recipes` in a wheel, `recipes/` beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"
