"""What `accelerate launch` was told, beside what the recipe says: where they differ, neither wins.

Its configuration file reaches us as environment variables, and `Accelerator` would act on them
behind the recipe's back: its own FSDP2 path puts the whole quantized model on every GPU.
"""

import logging
from collections.abc import Iterator, Mapping, MutableMapping

from hqqtrain.config import RunConfig, UserError

logger = logging.getLogger(__name__)

_ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_INSTEAD = "run `accelerate config` again for plain multi-GPU, or launch with torchrun"


def settle(environ: MutableMapping[str, str], config: RunConfig) -> tuple[str, str]:
    """Takes over what accelerate's configuration says, where it may.

    FSDP is `fsdp2` or `fsdp1`, by its version, and DeepSpeed's stage 3 is `zero3`; they are ours
    alone from then on. mixed_precision is what `train.precision=auto` means.

    Returns:
        `parallel.strategy` and `train.precision`, either of which may still be `auto`.

    Raises UserError, naming both sides, for what contradicts the recipe or is not there.
    """
    strategy, precision = config.parallel.strategy, config.train.precision
    faults = [
        *_engines(environ),
        *_offload(environ, config),
        *_clipping(environ, config),
        *_precision(environ, precision),
    ]
    asked, fault = _strategy(environ)
    if fault:
        faults.append(fault)
    elif asked and strategy not in ("auto", asked):
        faults.append(
            f"parallel.strategy={strategy}: accelerate's configuration asks for {asked}; use "
            f"parallel.strategy={asked}, or {_INSTEAD}."
        )
    if faults:
        raise UserError("\n".join(faults))
    if asked:
        logger.info("accelerate's configuration: %s; its other settings are not used", asked)
        environ[_FSDP] = environ[_DEEPSPEED] = "false"
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return asked or strategy, mixed if precision == "auto" and mixed != "no" else precision


def _engines(environ: Mapping[str, str]) -> Iterator[str]:
    for name, engine in _ENGINES.items():
        if _is_on(environ, name):
            yield f"accelerate's configuration asks for {engine}, not used here; {_INSTEAD}."
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        yield (
            f"accelerate's configuration asks for dynamo_backend {backend}: models are not "
            f"compiled here; set it to 'no'."
        )


def _strategy(environ: Mapping[str, str]) -> tuple[str, str]:
    """(the strategy that the configuration is, if any; what is wrong with it, if anything)."""
    if _is_on(environ, _DEEPSPEED):
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
            return "", (
                "accelerate's configuration names a deepspeed_config_file, which is not read here; "
                "take it out and set zero_stage: 3."
            )
        fault = "" if stage == "3" else (
            f"accelerate's configuration says zero_stage: {stage}; packed weights are cut by "
            "stage 3, where parallel.strategy=zero3."
        )  # fmt: skip
        return "zero3", fault
    if not _is_on(environ, _FSDP):
        return "", ""
    version = environ.get("FSDP_VERSION", "1")
    if version not in ("1", "2"):
        return "", f"accelerate's configuration says fsdp_version: {version}; use 2 or 1."
    return f"fsdp{version}", ""


def _offload(environ: Mapping[str, str], config: RunConfig) -> Iterator[str]:
    wanted = _is_on(environ, _FSDP) and _is_on(environ, "FSDP_OFFLOAD_PARAMS")
    if wanted and not config.parallel.offloads_parameters:
        yield (
            "accelerate's configuration says fsdp_offload_params: true; the recipe keeps "
            "parameters on the GPU: set it to false, or parallel.offload=parameters (of fsdp2)."
        )
    for what in ("param", "optimizer") if _is_on(environ, _DEEPSPEED) else ():
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if device not in ("none", ""):
            yield (
                f"accelerate's configuration says offload_{what}_device: {device}; zero3 keeps all "
                "on the GPU here: set it to none, or use fsdp2 with parallel.offload=parameters."
            )


def _clipping(environ: Mapping[str, str], config: RunConfig) -> Iterator[str]:
    asked, limit = environ.get("ACCELERATE_GRADIENT_CLIPPING", "none"), config.train.max_grad_norm
    if _is_on(environ, _DEEPSPEED) and asked not in ("none", str(limit)):
        yield (
            f"accelerate's configuration says gradient_clipping: {asked}, the recipe "
            f"train.max_grad_norm={limit}; make them agree, or take out gradient_clipping."
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
