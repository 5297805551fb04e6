"""Imports and makes what every forked run would import and make again, in the fork server.

A run of the small model takes 0.8 s of CPU time. It spends a third of that on tables of
transformers and on garbage collection, which visits and copies all that the server has imported.
"""

import gc
import importlib

gc.disable()  # it would pass over all modules several times while they are imported

MODULES = (
    "hqqtrain.tasks.dispatch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama",
    "hqqtrain.compose.compose", "pytest", "wandb",
)  # fmt: skip
"""Modules that neither start a thread nor read RANK: a fork would copy what they have read."""

for name in MODULES:
    importlib.import_module(name)

from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

from hqqtrain.compose.compose import compose_config  # noqa: E402
from hqqtrain.rundir.identity import package_versions  # noqa: E402

get_checkpoint_conversion_mapping("llama")
compose_config(["recipe=tiny_2bit"])
package_versions()
gc.collect()
gc.freeze()
gc.enable()
