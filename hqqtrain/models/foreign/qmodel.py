"""Convert `qmodel.pt`, hqq's own file, to the safetensors form, once, in the user's cache.

The file is a pickle. A child process reads it (`unpickle.py`), which can neither run code of the
file nor use more than a bounded amount of memory and time. The result is kept in the user's cache
under the digest of the file, complete or absent.
"""

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write_json
from hqqtrain.common.packed_folders import HQQ_PICKLE
from hqqtrain.models.foreign.converted import converted

_ADVICE = "Save the model again with hqq, or use its safetensors form (save_to_safetensors)."

FREE_BYTES = 1 << 30
"""Memory that the child process may use in addition to multiples of the size of the file."""

CPU_SECONDS_PER_GIB, FREE_CPU_SECONDS = 60, 60
"""Time that the child process may compute, by the size of the file and in any case."""


def converted_folder(folder: Path, config_json: Mapping[str, Any]) -> Path | None:
    """Return the folder with the weights of `folder`/qmodel.pt as safetensors.

    Args:
        folder: The folder of a model that hqq has quantized.
        config_json: Its config.json, which the result gets, too.

    Returns:
        A folder of the user's cache; None if `folder` itself has safetensors files.

    Raises:
        UserError: The file cannot be converted, or the cache cannot be written to.
    """
    file = folder / HQQ_PICKLE
    if any(folder.glob("*.safetensors")) or not file.is_file():
        return None

    def make(partial: Path, digest: str) -> None:
        convert_pickle(file, partial, "the weights that hqq's save_quantized writes", _ADVICE)
        atomic_write_json(partial / "config.json", config_json)

    return converted(folder.resolve().name, folder, [HQQ_PICKLE, "config.json"], make)


def convert_pickle(file: Path, folder: Path, what: str, advice: str) -> None:
    """Convert a pickle of hqq to safetensors files, in a process of its own.

    Args:
        file: The pickle.
        folder: The folder to write to.
        what: What the file is, for messages.
        advice: How to get a better one.

    Raises:
        UserError: The file cannot be converted.
    """
    try:
        _check_zip(file)
        _convert(file, folder)
    except _RefusedError as error:
        raise UserError(f"{file}: cannot be read as {what}: {error}. {advice}") from error


class _RefusedError(Exception):
    """A file cannot be converted. The message is the reason."""


def _check_zip(file: Path) -> None:
    """Check that the file is a zip whose parts are not compressed, as torch.save writes it.

    Raises:
        _RefusedError: It is not. Its parts could be far larger than the file.
    """
    try:
        with zipfile.ZipFile(file) as parts:
            is_plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts.infolist())
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _RefusedError("it is not a complete file of torch.save") from error
    if not is_plain:
        raise _RefusedError("its parts are compressed, as torch.save never does it")


def _convert(file: Path, folder: Path) -> None:
    """Run the child process.

    Raises:
        _RefusedError: It fails. The message has the last line that it has written.
    """
    size = file.stat().st_size
    command = [sys.executable, "-P", str(Path(__file__).with_name("unpickle.py"))]
    limits = [str(FREE_BYTES + 3 * size), str(FREE_BYTES + 2 * size),
              str(FREE_CPU_SECONDS + CPU_SECONDS_PER_GIB * (size >> 30))]  # fmt: skip
    command += [str(file), str(folder), *limits]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode < 0:
        reason = f"signal {-result.returncode}"
        raise _RefusedError(f"its reader was stopped or has crashed ({reason})")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise _RefusedError(lines[-1][:300])
