"""Write an adapter beside the exported base, as stock PEFT reads it."""

import os
from pathlib import Path

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.formats.base import ModelExport
from hqqtrain.formats.companions import GENERATION_CONFIG, companion_files, copy_companion_files
from hqqtrain.formats.peft import write_adapter


def write_separate_adapter(export: ModelExport, folder: Path, base: Path) -> None:
    """Write the adapter of `export` to `folder`, which does not exist.

    Its adapter_config.json names the exported base by its full path, which works in every working
    directory.

    Args:
        export: The model with its adapter.
        folder: The folder to create.
        base: The final folder of the exported base.
    """
    adapter, source, settings = export.adapter, export.adapter_folder, export.settings
    assert adapter is not None
    assert source is not None
    folder.mkdir()
    name = mask_secrets(os.path.abspath(base), "commit")
    ref = BaseModelRef(name, None, settings.fingerprint, bool(settings.modules))
    write_adapter(folder, adapter.state, adapter.config, ref)
    files = companion_files(source)
    copy_companion_files({k: v for k, v in files.items() if k == GENERATION_CONFIG}, folder)
