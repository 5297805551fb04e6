"""Compute the outputs of the full-precision model once for each batch.

The full-precision model never changes, but it is needed at every evaluation, to measure the KL
divergence. Its logits are too large to keep, but they follow from the hidden states that its head
gets, which are smaller by the ratio of vocabulary to hidden size. With them, an evaluation needs
the head alone. A file in `run.root` keeps them for later runs.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from hqqtrain.common.errors import UserError
from hqqtrain.common.files import atomic_write, check_owner, make_folder
from hqqtrain.models.causal_lm import MAX_KEPT_BYTES
from hqqtrain.models.families.structure import output_head

logger = logging.getLogger(__name__)

MIN_FLOP = 1 << 38
"""Least number of operations of an evaluation that is worth a file, some seconds on a CPU."""


class ResidentReference(nn.Module):
    """A causal language model that is called only for batches that it has not seen.

    It gives the same bits as the model: the first batch shows whether the model returns the output
    of its head unchanged, and if it does not, the model is called every time.

    Args:
        structure: The model on the meta device, for questions about its structure.
        head: A head with the weights of the model's head.
        load: Loads the model.
        file: The file of the hidden states; None: they are kept in memory only.
    """

    def __init__(
        self,
        structure: nn.Module,
        head: nn.Module,
        load: Callable[[], nn.Module],
        file: Path | None,
    ) -> None:
        super().__init__()
        self.model = structure
        self._load: Callable[[], nn.Module] | None = load
        self._file = file
        # In a list it is no submodule: it belongs to the model that is evaluated.
        self._heads = [head]
        self._hidden_states = _read(file) if file else {}
        self._saved = len(self._hidden_states)
        self._is_verified, self._keeps = False, True
        if not self._saved:
            self.load()

    def load(self) -> None:
        """Load the model if it is not loaded yet."""
        if self._load:
            self.model, self._load = self._load(), None

    def forward(self, *, use_cache: bool = False, **inputs: Tensor) -> Any:
        """Return an object with `logits`, as the model does."""
        key = batch_digest(inputs)
        if key in self._hidden_states:
            device = inputs["input_ids"].device
            return SimpleNamespace(logits=self._heads[0](self._hidden_states[key].to(device)))
        self.load()
        hidden_states: list[Tensor] = []
        hook = output_head(self.model).register_forward_pre_hook(
            lambda _, args: hidden_states.extend(args[:1])
        )
        with hook:
            output = self.model(**inputs, use_cache=use_cache)
        if self._keeps:
            self._keep(key, hidden_states, output.logits)
        return output

    def save(self) -> None:
        """Write the hidden states to the file, if there are new ones."""
        if self._file is None or len(self._hidden_states) == self._saved:
            return
        try:
            make_folder(self._file.parent)
            check_owner(self._file.parent, f"run.root={self._file.parent.parent}")
            atomic_write(self._file, safetensors.torch.save(self._hidden_states))
        except (OSError, UserError) as error:
            logger.warning("the outputs of the full-precision model are not kept: %s", error)
        self._saved = len(self._hidden_states)

    def _keep(self, key: str, hidden_states: list[Tensor], logits: Tensor) -> None:
        """Keep the hidden states of a batch, unless the logits do not follow from them."""
        if not self._is_verified:
            self._is_verified = len(hidden_states) == 1 and torch.equal(
                self._heads[0](hidden_states[0]), logits
            )
        kept = sum(states.nbytes for states in self._hidden_states.values())
        if not self._is_verified or kept + hidden_states[0].nbytes > MAX_KEPT_BYTES:
            self._keeps = False
            self._hidden_states.clear()
            return
        self._hidden_states[key] = hidden_states[0].cpu().contiguous()


def batch_digest(inputs: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of the arguments of a call."""
    content = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        tensor = value.detach().cpu().contiguous() if isinstance(value, Tensor) else None
        content.update(repr((name, value if tensor is None else tensor.shape)).encode())
        if tensor is not None:
            content.update(tensor.numpy().tobytes())
    return content.hexdigest()


def reference_file(root: Path, model_name: str, settings: Mapping[str, Any]) -> Path:
    """Return the file below `root` for the outputs of a model.

    Args:
        root: The folder of all runs.
        model_name: The name of the model, for people.
        settings: All that decides the bits of the outputs, apart from the software and the
            processor, as JSON values.
    """
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    digest = hashlib.sha256(json.dumps({**settings, **machine}, sort_keys=True).encode())
    short_name = model_name.rstrip("/").rpartition("/")[2]
    return root / "reference" / f"{short_name}-{digest.hexdigest()[:24]}.safetensors"


def _read(file: Path) -> dict[str, Tensor]:
    """Return the hidden states in `file`; none if it is missing, damaged or another user's."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as stream:
            status = os.fstat(fd)
            if status.st_uid not in (os.getuid(), 0) or status.st_size > 2 * MAX_KEPT_BYTES:
                return {}
            hidden_states = safetensors.torch.load(stream.read())
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("%s: cannot be read (%s), so it is made again.", file, error)
        return {}
    logger.info("the outputs of the full-precision model are read from %s", file)
    return hidden_states
