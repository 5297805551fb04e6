"""Makes what every forked run would make again; the fork server imports it last.

A run of the small model takes 0.8 s of CPU time. It spends a third of that on tables of
transformers and on garbage collection, which visits and copies all that the server has imported.
"""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hqqtrain.compose.compose import compose_config

get_checkpoint_conversion_mapping("llama")
compose_config(["recipe=tiny_2bit"])
gc.collect()
gc.freeze()
