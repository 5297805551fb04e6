"""Find recipes: `recipe=NAME` is NAME.yaml in the first recipe folder that contains it.

`recipe=./mine.yaml` and other paths name the file itself.

The user's folders come before the built-in one, so a project can keep, extend or replace recipes
without touching the installed package.
"""

import os
from pathlib import Path

RECIPES_VARIABLE = "HQQTRAIN_RECIPES"
"""Environment variable with the user's recipe folders, separated as in PATH."""


def find_recipe_folders() -> list[tuple[str, Path]]:
    """Return (provider, folder) in order: $HQQTRAIN_RECIPES, ./recipes, then the built-in ones."""
    listed = [Path(part) for part in os.environ.get(RECIPES_VARIABLE, "").split(os.pathsep) if part]
    folders = [(RECIPES_VARIABLE, folder) for folder in listed]
    folders += [("cwd", Path("recipes")), ("hqqtrain", _builtin_folder())]
    providers: dict[Path, str] = {}
    for provider, folder in folders:
        providers.setdefault(folder.resolve(), provider)  # a repeated folder keeps its first place
    return [(provider, folder) for folder, provider in providers.items() if folder.is_dir()]


def find_recipes() -> dict[str, Path]:
    """Return the file of every recipe by name; an earlier folder wins over a later one."""
    files: dict[str, Path] = {}
    for _, folder in find_recipe_folders():
        for file in sorted(folder.glob("*.yaml")):
            if file.is_file():  # reading a pipe would wait without end
                files.setdefault(file.stem, file)
    return files


def recipe_file(name: str) -> Path | None:
    """Return the file that `recipe=` names by its path; None if `name` is that of a recipe.

    A path has a slash or ends with .yaml or .yml.
    """
    if "/" not in name and not name.endswith((".yaml", ".yml")):
        return None
    file = Path(name).expanduser()
    if file.suffix in (".yaml", ".yml") or not file.name:  # `./` has no name
        return file
    return file.with_name(f"{file.name}.yaml")


def recipe_name(name: str) -> str:
    """Return the name of the recipe that `recipe=` selects: that of its file, without .yaml."""
    file = recipe_file(name)
    return file.stem if file else name


def read_recipe_description(file: Path) -> str:
    """Return the comment on the first line of a recipe, without the `#`, or an empty string."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        first_line = lines.readline().strip()
    return first_line.lstrip("# ") if first_line.startswith("#") else ""


def _builtin_folder() -> Path:
    """Return `hqqtrain/recipes` of a wheel, or `recipes/` next to the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"
