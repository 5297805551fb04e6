"""What `accelerate launch` was told, beside what the recipe says: where they differ, neither wins.

Its configuration file reaches us as environment variables, and `Accelerator` would act on them
behind the recipe's back: its own FSDP2 path puts the whole quantized model on every GPU.
"""

import logging
from collections.abc import Iterator, Mapping, MutableMapping

from hqqtrain.config import UserError

logger = logging.getLogger(__name__)

_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_FSDP = "ACCELERATE_USE_FSDP"
_INSTEAD = "run `accelerate config` again for plain multi-GPU, or launch with torchrun"


def settle(environ: MutableMapping[str, str], *, strategy: str, precision: str) -> str:
    """Takes over what accelerate's configuration says, where it may: returns `train.precision`.

    FSDP version 2 is `parallel.strategy=fsdp2`, and is ours alone from then on; mixed_precision is
    what `train.precision=auto` means.

    Raises UserError, naming both sides, for what contradicts the recipe or is not there.
    """
    faults = [*_engines(environ), *_fsdp(environ, strategy), *_precision(environ, precision)]
    if faults:
        raise UserError("\n".join(faults))
    if _is_on(environ, _FSDP):
        logger.info("accelerate's FSDP settings: version 2 is used, the others are hqqtrain's own")
        environ[_FSDP] = "false"
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return mixed if precision == "auto" and mixed != "no" else precision


def _engines(environ: Mapping[str, str]) -> Iterator[str]:
    for name, engine in _ENGINES.items():
        if _is_on(environ, name):
            yield f"accelerate's configuration asks for {engine}, which is not used here; {_INSTEAD}."
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        yield (
            f"accelerate's configuration asks for dynamo_backend {backend}: models are not compiled "
            f"here; set it to 'no'."
        )


def _fsdp(environ: Mapping[str, str], strategy: str) -> Iterator[str]:
    if not _is_on(environ, _FSDP):
        return
    version = environ.get("FSDP_VERSION", "1")
    if strategy not in ("auto", "fsdp2"):
        yield (
            f"parallel.strategy={strategy}: accelerate's configuration asks for FSDP; use "
            f"parallel.strategy=fsdp2, or {_INSTEAD}."
        )
    elif version != "2":
        yield (
            f"accelerate's configuration says fsdp_version: {version}; packed weights need 2, "
            "where parallel.strategy=fsdp2."
        )
    if _is_on(environ, "FSDP_OFFLOAD_PARAMS"):
        yield (
            "accelerate's configuration says fsdp_offload_params: true; parameters stay on the GPU "
            "here: set it to false. (parallel.offload=activations saves memory.)"
        )


def _precision(environ: Mapping[str, str], precision: str) -> Iterator[str]:
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed == "no":  # what it says where nobody has thought of it
        return
    if mixed not in ("bf16", "fp16"):
        yield f"accelerate's configuration says mixed_precision: {mixed}; use bf16, fp16 or no."
    elif precision not in ("auto", mixed):
        yield (
            f"train.precision={precision}: accelerate's configuration says mixed_precision: "
            f"{mixed}; make them agree, or set one to auto or no."
        )


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1", "yes")
