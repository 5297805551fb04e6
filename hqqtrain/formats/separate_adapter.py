"""Write an adapter beside the exported base, as stock PEFT reads it."""

import copy
import os
from dataclasses import replace
from pathlib import Path

from torch.nn.functional import pad

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.base_parts import BaseParts
from hqqtrain.formats.companions import GENERATION_CONFIG, companion_files, copy_companion_files
from hqqtrain.formats.peft import Adapter, write_adapter


def write_separate_adapter(
    export: ModelExport, folder: Path, base: Path, *, lora_alone: bool = False
) -> None:
    """Write the adapter of `export` to `folder`, which does not exist.

    Its adapter_config.json names the exported base by its full path, which works in every working
    directory.

    Args:
        export: The model with its adapter.
        folder: The folder to create.
        base: The final folder of the exported base.
        lora_alone: Whether to write the LoRA matrices alone, with one rank and one scale for all
            modules. vLLM refuses other tensors, and ignores `rank_pattern` and `alpha_pattern`.
    """
    adapter, source, settings = export.adapter, export.adapter_folder, export.settings
    assert adapter is not None
    assert source is not None
    if lora_alone:
        adapter = _lora_alone(adapter)
    folder.mkdir()
    name = mask_secrets(os.path.abspath(base), "commit")
    ref = BaseModelRef(name, None, settings.fingerprint, bool(settings.modules))
    write_adapter(folder, adapter.state, adapter.config, ref)
    files = companion_files(source)
    copy_companion_files({k: v for k, v in files.items() if k == GENERATION_CONFIG}, folder)


def _lora_alone(adapter: Adapter) -> Adapter:
    """Return an adapter without tensors of its base; smaller ranks are padded with zeros."""
    config = copy.deepcopy(adapter.config)
    state = {name: tensor for name, tensor in adapter.state.items() if ".lora_" in name}
    BaseParts().add_to(config)
    if config.rank_pattern or config.alpha_pattern:
        rank = max(len(tensor) for name, tensor in state.items() if ".lora_A." in name)
        for module in adapter.modules:
            A, B = (adapter.matrix_name(module, matrix) for matrix in "AB")
            scaled, padding = adapter.scaling(module) * state[B], rank - len(state[A])
            state[A] = pad(state[A], (0, 0, 0, padding))
            state[B] = pad(scaled, (0, padding))
        config.r = config.lora_alpha = rank
        config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    return replace(adapter, config=config, state=state)
