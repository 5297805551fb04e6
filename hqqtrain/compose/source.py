"""Hydra plugins that make DIR/x.yaml of a recipe folder the option `recipe=x`.

By itself Hydra would require DIR/recipe/x.yaml and a `# @package _global_` line in each file. Each
file is also checked when it is read, so that an error names the file that contains it.
"""

import io
import itertools
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from yaml import CollectionNode, MappingNode, SafeLoader, YAMLError, compose

from hqqtrain.common.errors import ErrorCollector, UserError
from hqqtrain.common.reading import read_bounded
from hqqtrain.compose.messages import broken_yaml_error, check_type
from hqqtrain.compose.recipes import find_recipe_folders, recipe_file
from hqqtrain.compose.schema import describe_unknown_key, list_known_keys

RECIPE_GROUP = "recipe"
"""Hydra's config group of the recipes."""


_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
"""Limits of a recipe; the largest that we ship has some hundred bytes."""


class RecipeSource(ConfigSource):
    """One folder of recipes, with the methods that Hydra requires of a ConfigSource."""

    @staticmethod
    def scheme() -> str:
        return "recipe"

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return config_path in ("", RECIPE_GROUP)

    def is_config(self, config_path: str) -> bool:
        return self._file(config_path).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [RECIPE_GROUP] if results_filter != ObjectType.CONFIG else []
        if config_path != RECIPE_GROUP or results_filter == ObjectType.GROUP:
            return []
        return sorted(file.stem for file in Path(self.path).glob("*.yaml"))

    def load_config(self, config_path: str) -> ConfigResult:
        file = self._file(config_path)
        if not file.is_file():
            raise ConfigLoadError(f"no recipe {config_path}")
        return ConfigResult(
            provider=self.provider,
            path=str(file),
            config=read_recipe(file),
            header={"package": "_global_"},
        )

    def _file(self, config_path: str) -> Path:
        """Return the file of `recipe/NAME`. For any other path, return the folder instead.

        NAME may be the path of a file, which every folder finds.
        """
        group, _, name = config_path.partition("/")
        if group == RECIPE_GROUP and (file := recipe_file(name)):
            return file
        is_recipe = group == RECIPE_GROUP and name and "/" not in name
        return Path(self.path) / self._normalize_file_name(name) if is_recipe else Path(self.path)


class RecipeSearchPath(SearchPathPlugin):
    """Adds every recipe folder to Hydra's search path, the user's before the built-in one."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for provider, folder in find_recipe_folders():
            search_path.append(provider, f"recipe://{folder}")


def read_recipe(file: Path) -> DictConfig:
    """Read a recipe and check every key and type in it against the schema.

    Raises:
        UserError: the file is unreadable, not YAML, far too large, or has an unknown key or a wrong
            type. The message names the file, and the line if it is not YAML.
    """
    try:
        text = read_bounded(file, _MAX_BYTES).decode()
        _check_expansion(file, text)
        content = OmegaConf.load(io.StringIO(text))
    except YAMLError as error:
        raise broken_yaml_error(error, file) from None
    except RecursionError:
        raise UserError(f"{file}: is nested too deeply for a recipe.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as text: {error}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{file}: must be a mapping of keys, such as `quant: {{nbits: 2}}`.")
    _check_content(content, file)
    return content


def _check_expansion(file: Path, text: str) -> None:
    """Refuse aliases that stand for far more values than a recipe has.

    A few lines of aliases of aliases can stand for billions of values, which would fill the memory.
    """
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        """Return the number of values that `node` stands for, counting each alias."""
        if id(node) not in sizes:
            parts = node.value if isinstance(node, CollectionNode) else []
            pairs = isinstance(node, MappingNode)
            sizes[id(node)] = 1 + sum(map(size, itertools.chain(*parts) if pairs else parts))
        return sizes[id(node)]

    root = compose(text, SafeLoader)
    if root is not None and (values := size(root)) > _MAX_VALUES:
        raise UserError(f"{file}: its aliases stand for {values:,} values; write them out.")


def _check_content(content: DictConfig, file: Path) -> None:
    """Refuse unknown keys and values of a wrong type, all at once."""
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items() if key != "defaults"}
    errors = ErrorCollector()
    for key, value in _dotted(settings).items():
        if key in settings and "." in key:
            errors.lines.append(f"{file}: {key}: {_nested_advice(key)}")
        elif message := describe_unknown_key(key):
            errors.lines.append(f"{file}: {message}")
        elif key == RECIPE_GROUP:
            errors.lines.append(
                f"{file}: recipe: not allowed here, because the name of the file is the name of "
                "the recipe; to extend another recipe, use defaults."
            )
        else:
            with errors.collect():
                check_type(key, value, f"{file}: ")
    errors.lines += list_known_keys(_dotted(settings))
    errors.raise_if_any()


def _nested_advice(key: str) -> str:
    """Return how to write a dotted key of the command line in a recipe."""
    group, _, name = key.partition(".")
    return f"a recipe has a mapping for each group; write {group}: {{{name}: ...}}."


def _dotted(settings: dict[str, Any]) -> dict[str, Any]:
    """Return values by dotted keys: `{quant: {nbits: 2}, task: eval}` -> `quant.nbits`, `task`."""
    dotted: dict[str, Any] = {}
    for name, value in settings.items():
        is_group = isinstance(value, dict) and value and name != "sweep" and "." not in name
        dotted |= {f"{name}.{key}": v for key, v in value.items()} if is_group else {name: value}
    return dotted
