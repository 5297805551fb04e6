"""Import the `gguf` package, which is optional."""

import importlib
from typing import Any

from hqqtrain.common.errors import UserError


def import_gguf() -> Any:
    """Return the package `gguf` of the llama.cpp project.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            'export.format=gguf: needs the package gguf; install it with pip install "hqqtrain'
            '[gguf]" or pip install "gguf>=0.19,<0.20", or use another format.'
        ) from error
