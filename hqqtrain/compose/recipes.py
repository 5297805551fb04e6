"""Find recipes: `recipe=NAME` is NAME.yaml in the first recipe folder that contains it.

The user's folders come before the built-in one, so a project can keep, extend or replace recipes
without touching the installed package.
"""

import os
from pathlib import Path

VARIABLE = "HQQTRAIN_RECIPES"


def recipe_dirs() -> list[tuple[str, Path]]:
    """Return (provider, folder) in order: $HQQTRAIN_RECIPES, ./recipes, then the built-in ones."""
    listed = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    found = [(VARIABLE, folder) for folder in listed]
    found += [("cwd", Path("recipes")), ("hqqtrain", _builtin())]
    # Twice reversed: a folder that is listed twice keeps its first place.
    unique = {folder.resolve(): provider for provider, folder in reversed(found)}
    return [(provider, folder) for folder, provider in reversed(unique.items()) if folder.is_dir()]


def recipe_files() -> dict[str, Path]:
    """Return the file of every recipe by name; an earlier folder wins over a later one."""
    files: dict[str, Path] = {}
    for _, folder in recipe_dirs():
        for file in sorted(folder.glob("*.yaml")):
            files.setdefault(file.stem, file)
    return files


def description(file: Path) -> str:
    """Return the comment on the first line of a recipe, without the `#`, or an empty string."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = lines.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""


def _builtin() -> Path:
    """Return `hqqtrain/recipes` of a wheel, or `recipes/` next to the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"
