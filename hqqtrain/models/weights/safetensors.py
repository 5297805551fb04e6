"""Reading a safetensors checkpoint in slices: one process never needs more than its rows.

Files are opened for each read and closed after it: memory-mapped pages would otherwise count
as ours until the end. What is wrong with a checkpoint is found before any weight is read.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hqqtrain.common.errors import UserError

SINGLE = "model.safetensors"

INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class SafetensorsReader:
    """The tensors of a Hugging Face folder, in `model.safetensors` or in shards with an index.

    `aliases` maps names to others that are read in their place where the file lacks them
    (a tied `lm_head.weight`). `pin_memory`: for copies to a GPU that nobody waits for.
    `bytes_read` counts what `read` returned; one read `ahead` of use hides the disk behind the
    quantizing. Raises UserError for a missing, truncated or foreign file.
    """

    def __init__(
        self, folder: Path, aliases: dict[str, str] | None = None, *, pin_memory: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.bytes_read, self.ahead, self._pins = 0, 1, pin_memory
        self._facts: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for path in _files(self.folder):
            self._facts |= {name: (path, *fact) for name, fact in _header(path).items()}
        _check_index(self.folder, self._facts)
        self._aliases = {a: b for a, b in (aliases or {}).items() if a not in self._facts}

    @property
    def names(self) -> list[str]:
        """All tensors of the checkpoint, sorted."""
        return sorted(self._facts)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(_nbytes(shape, kind) for _, shape, kind in self._facts.values())

    def __contains__(self, name: str) -> bool:
        return self._aliases.get(name, name) in self._facts

    def shape(self, name: str) -> tuple[int, ...]:
        return self._fact(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self._fact(name)[2]]

    def read(self, name: str, rows: Sequence[slice] | None = None) -> torch.Tensor:
        """Tensor `name` on the CPU, in the dtype of the file, in memory of its own.

        `rows`: slices of dimension 0, returned one after the other; only they are read.
        """
        path, shape, _ = self._fact(name)
        rows = [slice(0, n) for n in shape[:1]] if rows is None else rows
        assert all(0 <= r.start <= r.stop <= shape[0] for r in rows), (name, rows, shape)
        with _open(path) as file:
            real = self._aliases.get(name, name)
            if not shape:
                return self._counted(file.get_tensor(real).clone())
            part = file.get_slice(real)
            size = (sum(r.stop - r.start for r in rows), *shape[1:])
            tensor = torch.empty(size, dtype=self.dtype(name), pin_memory=self._pins)
            for target, r in zip(tensor.split([r.stop - r.start for r in rows]), rows, strict=True):
                target.copy_(part[r.start : r.stop])
        return self._counted(tensor)

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes_read += tensor.nbytes
        return tensor

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Raises UserError where a tensor of `expected` (name -> shape) is missing or differs.

        Returns the names of the checkpoint that nothing expects, for the caller to mention.
        """
        missing = [name for name in expected if name not in self]
        if missing:
            raise UserError(self._explain_missing(missing, expected))
        for name, shape in expected.items():
            path, found, _ = self._fact(name)
            if found != tuple(shape):
                raise UserError(
                    f"{path}: {name} has shape {list(found)}; config.json of the model asks for "
                    f"{list(shape)}. The two files do not belong together."
                )
        used = {self._aliases.get(name, name) for name in expected}
        return [name for name in self.names if name not in used]

    def _explain_missing(self, missing: list[str], expected: dict[str, Any]) -> str:
        where = f"{self.folder}: {len(missing)} of {len(expected)} tensors are missing, among them"
        if len(missing) < len(expected) / 2:
            return f"{where} {missing[0]}. The checkpoint is incomplete: fetch it again."
        return (
            f"{where} {missing[0]}. Its names (such as {self.names[0] if self.names else 'none'}) "
            "are not those of the architecture in config.json as transformers builds it: convert "
            "the checkpoint with transformers' save_pretrained."
        )

    def _fact(self, name: str) -> tuple[Path, tuple[int, ...], str]:
        real = self._aliases.get(name, name)
        if real not in self._facts:
            raise UserError(f"{self.folder}: holds no tensor named {name}.")
        return self._facts[real]


def _files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`, sorted; as in transformers, one file beats an index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder / INDEX).values()))]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise UserError(
            f"{folder}: its weights are PyTorch .bin or .pth files. They are pickles, which can "
            "run code and cannot be read in slices: convert them to safetensors with "
            "transformers' save_pretrained, or choose a model.revision that has them."
        )
    raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}. Only safetensors are read.")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(found.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors index ({error!r}).") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: names the file {name!r}; shards lie in the same folder.")
    return found


def _check_index(folder: Path, facts: dict[str, tuple[Path, tuple[int, ...], str]]) -> None:
    if (folder / SINGLE).is_file():
        return
    for name, file in _weight_map(folder / INDEX).items():
        if name not in facts or facts[name][0].name != file:
            raise UserError(f"{folder / file}: {name} is missing, which {INDEX} promises.")


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    facts = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise UserError(f"{path}: {name} has dtype {part.get_dtype()}, which is not read.")
            facts[name] = (tuple(part.get_shape()), part.get_dtype())
    return facts


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing, though {INDEX} names it. Fetch it again.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a complete safetensors file, {path.stat().st_size} bytes ({error}). "
            "Fetch it again."
        ) from error


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * _DTYPES[kind].itemsize
