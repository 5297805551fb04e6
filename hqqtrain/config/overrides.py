"""Check the settings that `quant.overrides` has for single layers, which Hydra does not check."""

from collections.abc import Iterator, Mapping
from typing import Any


def override_errors(
    where: str, settings: Any, choices: Mapping[str, tuple[Any, ...]]
) -> Iterator[str]:
    """Yield one message for every wrong setting of the layers that one pattern matches.

    Args:
        where: The key and the pattern, with which each message begins.
        settings: The user's value: null or a mapping.
        choices: Allowed values by key, for all keys apart from group_size.
    """
    if settings is None:
        return
    if not isinstance(settings, dict):
        yield f"{where}={settings}: must be null or settings such as {{nbits: 4}}."
        return
    for name, value in settings.items():
        if name == "group_size":
            if value is not None and (type(value) is not int or value < 2):
                yield f"{where}.{name}={value}: must be null or an integer of at least 2."
        elif name not in choices:
            known = ", ".join([*choices, "group_size"])
            yield f"{where}.{name}: unknown; allowed are {known}."
        elif value not in choices[name] or isinstance(value, bool):  # True == 1
            allowed = ", ".join(map(str, choices[name]))
            yield f"{where}.{name}={value}: allowed are {allowed}."
