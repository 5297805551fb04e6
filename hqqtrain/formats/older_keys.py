"""Keys of config.json that programs read which do not know those of transformers 5 yet.

transformers 5 writes `rope_parameters` and `dtype`. transformers 4, mlx_lm and others read
`rope_theta`, `rope_scaling` and `torch_dtype`, and silently take defaults if these are missing: a
model with another base of its rotary embeddings then computes nonsense from the second token on.
"""

from collections.abc import Mapping
from typing import Any

_LAYER_TYPES = ("full_attention", "sliding_attention")


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the keys of transformers 4 added.

    A configuration of several parts, as a vision-language model has it, keeps them in `text_config`
    and the like, which get the keys, too.
    """
    older = {key: with_older_keys(v) for key, v in config.items() if key.endswith("_config")
             and isinstance(v, Mapping) and key != "quantization_config"}  # fmt: skip
    if "dtype" in config:
        older["torch_dtype"] = config["dtype"]
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and parameters:
        older |= _rope_keys(parameters)
    return {**config, **older}


def _rope_keys(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the older keys for `rope_parameters`."""
    if any(isinstance(parameters.get(kind), Mapping) for kind in _LAYER_TYPES):
        full, sliding = (parameters.get(kind) or {} for kind in _LAYER_TYPES)
        local = {"rope_local_base_freq": sliding["rope_theta"]} if "rope_theta" in sliding else {}
        return _rope_keys(full) | local
    keys = {k: v for k, v in parameters.items() if k in ("rope_theta", "partial_rotary_factor")}
    scaling = {key: v for key, v in parameters.items() if key not in keys}
    if scaling.get("rope_type", "default") != "default":
        keys["rope_scaling"] = scaling
    return keys
