"""Configurations that must be refused."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig


def refusal(**groups: dict[str, object]) -> str:
    """Return the message of `RunConfig.check` after setting the given keys of each group."""
    config = RunConfig()
    for group, values in groups.items():
        for name, value in values.items():
            setattr(getattr(config, group), name, value)
    with pytest.raises(UserError) as caught:
        config.check()
    return str(caught.value)
