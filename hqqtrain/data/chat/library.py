"""The chat templates that come with this package, for models whose tokenizer has none.

They are of the shape that the named models read, without tools. Each marks what the assistant
generates, with the token that ends a turn.
"""

from pathlib import Path

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.config.groups import AUTO

_FOLDER = Path(__file__).with_name("templates")


def template_names() -> list[str]:
    """Return the names that `data.chat_template` may have."""
    return sorted(file.stem for file in _FOLDER.glob("*.jinja"))


def chat_template_source(name: str) -> str | None:
    """Return the Jinja text of a template; None for `auto`, the tokenizer's own.

    Args:
        name: The value of `data.chat_template`: `auto`, a name, or the path of a `.jinja` file.

    Raises:
        UserError: There is no template of that name, or the file cannot be read.
    """
    if name == AUTO:
        return None
    file = _FOLDER / f"{name}.jinja" if name in template_names() else Path(name).expanduser()
    if file.suffix != ".jinja":
        allowed = [AUTO, *template_names()]
        raise UserError(
            f"data.chat_template={name}: allowed are {', '.join(allowed)}, or the path of a .jinja "
            f"file.{did_you_mean(name, allowed)}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"data.chat_template={name}: cannot be read: {reason}.") from error
