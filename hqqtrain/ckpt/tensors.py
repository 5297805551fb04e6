"""Writing a safetensors file whose disk is full: an error that says so."""

import errno
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """`save_file`, with "format" in the metadata. Raises OSError where the disk does not take it:
    safetensors hides the system's in an error of its own."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
