"""Cope with `accelerate launch`: with its configuration, and with the ranks that it loses.

It passes its configuration file on as environment variables, and `Accelerator` would act on them
regardless of the recipe: its own FSDP2 path puts the whole quantized model on every GPU. So
`reconcile_accelerate_config` makes them agree with the recipe; a contradiction is an error.

On a machine without a GPU, `accelerate launch --num_processes 2` silently starts a single process
(accelerate 1.15, `simple_launcher`); `relaunch_if_ranks_were_lost` then starts all of them.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import psutil

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import ParallelConfig, TrainConfig

logger = logging.getLogger(__name__)

_ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}

_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"

_INSTEAD = "run `accelerate config` again for plain multi-GPU, or launch with torchrun"


def reconcile_accelerate_config(
    environ: MutableMapping[str, str], parallel: ParallelConfig, train: TrainConfig
) -> tuple[str, str]:
    """Adopt the strategy and the precision of accelerate's configuration.

    FSDP becomes `fsdp2` or `fsdp1` by its version, and DeepSpeed's stage 3 becomes `zero3`. Both
    are then switched off in `environ`, so that `Accelerator` does not apply them a second time.
    mixed_precision decides what `train.precision=auto` means.

    Args:
        environ: The process's environment, changed in place.
        parallel: The recipe's group, of which the strategy and offloading may contradict.
        train: The recipe's group, of which the precision and clipping may contradict.

    Returns:
        `parallel.strategy` and `train.precision`, either of which may still be `auto`.

    Raises:
        UserError: A setting contradicts the recipe or is not supported. The message names both
            sides, and all such settings at once.
    """
    strategy, precision = parallel.strategy, train.precision
    faults = [
        *_engines(environ),
        *_offload(environ, parallel),
        *_clipping(environ, train),
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
            yield f"accelerate's configuration asks for {engine}, not supported here; {_INSTEAD}."
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        yield (
            f"accelerate's configuration asks for dynamo_backend {backend}, but hqqtrain "
            "does not compile models; set it to 'no'."
        )


def _strategy(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return (strategy that the configuration asks for, error message); either may be empty."""
    if _is_on(environ, _DEEPSPEED):
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
            return "", (
                "accelerate's configuration names a deepspeed_config_file, which hqqtrain does "
                "not read; remove it and set zero_stage: 3."
            )
        fault = "" if stage == "3" else (
            f"accelerate's configuration says zero_stage: {stage}; only stage 3 shards the "
            "packed weights; set it to 3, which is parallel.strategy=zero3."
        )  # fmt: skip
        return "zero3", fault
    if not _is_on(environ, _FSDP):
        return "", ""
    version = environ.get("FSDP_VERSION", "1")
    if version not in ("1", "2"):
        return "", f"accelerate's configuration says fsdp_version: {version}; use 2 or 1."
    return f"fsdp{version}", ""


def _offload(environ: Mapping[str, str], parallel: ParallelConfig) -> Iterator[str]:
    wanted = _is_on(environ, _FSDP) and _is_on(environ, "FSDP_OFFLOAD_PARAMS")
    if wanted and not parallel.offloads_parameters:
        yield (
            "accelerate's configuration says fsdp_offload_params: true; the recipe keeps "
            "parameters on the GPU; set it to false, or set parallel.offload=parameters (fsdp2)."
        )
    for kind in ("param", "optimizer") if _is_on(environ, _DEEPSPEED) else ():
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind.upper()}_DEVICE", "none")
        if device not in ("none", ""):
            yield (
                f"accelerate's configuration says offload_{kind}_device: {device}; zero3 does not "
                "offload; set it to none, or use fsdp2 with parallel.offload=parameters."
            )


def _clipping(environ: Mapping[str, str], train: TrainConfig) -> Iterator[str]:
    asked, limit = environ.get("ACCELERATE_GRADIENT_CLIPPING", "none"), train.max_grad_norm
    if _is_on(environ, _DEEPSPEED) and asked not in ("none", str(limit)):
        yield (
            f"accelerate's configuration says gradient_clipping: {asked}, the recipe "
            f"train.max_grad_norm={limit}; make them agree, or remove gradient_clipping."
        )


def _precision(environ: Mapping[str, str], precision: str) -> Iterator[str]:
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed == "no":  # accelerate's default, so not a choice of the user
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


def relaunch_if_ranks_were_lost(arguments: Sequence[str]) -> None:
    """Replace this process by torchrun if `accelerate launch` has dropped the other ranks.

    If more than one process was requested, its single-process launcher leaves MASTER_PORT without
    RANK in the environment. Only the parent's command line has the number of processes.

    Args:
        arguments: Command line of `python -m hqqtrain`.

    Raises:
        UserError: The number of processes cannot be determined.
    """
    lost = {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    if not lost or "RANK" in os.environ:
        return
    count = _requested_processes()
    if count is None:
        raise UserError(
            "accelerate launch starts only one process on a machine without GPUs, though more "
            "were requested. Use `NPROC=2 ./launch.sh ...` or `torchrun --nproc-per-node 2 -m "
            "hqqtrain ...`."
        )
    master = [
        "--master_addr",
        os.environ["MASTER_ADDR"],
        "--master_port",
        os.environ["MASTER_PORT"],
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [*launcher, *master, "-m", "hqqtrain", *arguments])


def _requested_processes() -> int | None:
    """Return --num_processes of the parent's command line, None if it cannot be read."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.replace("-", "_").partition("=")
        if flag in ("__num_processes", "_n") and (value or following).isdigit():
            return int(value or following)
    return None
