"""Cope with `accelerate launch`: with its configuration, and with the ranks that it loses.

`accelerate launch` passes its configuration file on as environment variables. `Accelerator` would
act on them regardless of the recipe: its own FSDP2 path puts the whole quantized model on every
GPU. `reconcile_accelerate_config` therefore makes them agree with the recipe; a contradiction is an
error.

On a machine without a GPU, `accelerate launch --num_processes 2` silently starts a single process
(accelerate 1.15, `simple_launcher`); `relaunch_if_ranks_were_lost` then starts all of them.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import psutil

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import TrainConfig
from hqqtrain.config.parallel import ParallelConfig

logger = logging.getLogger(__name__)

_UNSUPPORTED_ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}

_FSDP_VARIABLE, _DEEPSPEED_VARIABLE = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"

_ADVICE = "run `accelerate config` again for plain multi-GPU, or launch with torchrun"


def reconcile_accelerate_config(
    environ: MutableMapping[str, str], parallel: ParallelConfig, train: TrainConfig
) -> tuple[str, str]:
    """Adopt the strategy and the precision of accelerate's configuration.

    FSDP becomes `fsdp2` or `fsdp1` by its version, and DeepSpeed's stage 3 becomes `zero3`. FSDP
    and DeepSpeed are then switched off in `environ`, so that `Accelerator` does not apply them a
    second time. accelerate's mixed_precision decides the meaning of `train.precision=auto`.

    Args:
        environ: The process's environment, changed in place.
        parallel: The recipe's group; its strategy and offloading may contradict `environ`.
        train: The recipe's group; its precision and clipping may contradict `environ`.

    Returns:
        `parallel.strategy` and `train.precision`, either of which may still be `auto`.

    Raises:
        UserError: A setting contradicts the recipe or is not supported. The message has a line for
            each such setting.
    """
    strategy, precision = parallel.strategy, train.precision
    errors = [
        *_engine_errors(environ),
        *_offload_errors(environ, parallel),
        *_clipping_errors(environ, train),
        *_precision_errors(environ, precision),
    ]
    requested, error = _requested_strategy(environ)
    if error:
        errors.append(error)
    elif requested and strategy not in ("auto", requested):
        errors.append(
            f"parallel.strategy={strategy}: accelerate's configuration asks for {requested}; use "
            f"parallel.strategy={requested}, or {_ADVICE}."
        )
    if errors:
        raise UserError("\n".join(errors))
    if requested:
        logger.info("accelerate's configuration: %s; its other settings are not used", requested)
        environ[_FSDP_VARIABLE] = environ[_DEEPSPEED_VARIABLE] = "false"
    mixed_precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "auto" and mixed_precision != "no":
        precision = mixed_precision
    return requested or strategy, precision


def _engine_errors(environ: Mapping[str, str]) -> Iterator[str]:
    for name, engine in _UNSUPPORTED_ENGINES.items():
        if _is_on(environ, name):
            yield f"accelerate's configuration asks for {engine}, not supported here; {_ADVICE}."
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        yield (
            f"accelerate's configuration asks for dynamo_backend {backend}, but hqqtrain "
            "does not compile models; set it to 'no'."
        )


def _requested_strategy(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return (strategy that the configuration asks for, error message); either may be empty."""
    if _is_on(environ, _DEEPSPEED_VARIABLE):
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() != "none":
            return "", (
                "accelerate's configuration names a deepspeed_config_file, which hqqtrain does "
                "not read; remove it and set zero_stage: 3."
            )
        if stage != "3":
            return "", (
                f"accelerate's configuration says zero_stage: {stage}; only stage 3 shards the "
                "packed weights; set it to 3, which is parallel.strategy=zero3."
            )
        return "zero3", ""
    if not _is_on(environ, _FSDP_VARIABLE):
        return "", ""
    version = environ.get("FSDP_VERSION", "1")
    if version not in ("1", "2"):
        return "", f"accelerate's configuration says fsdp_version: {version}; use 2 or 1."
    return f"fsdp{version}", ""


def _offload_errors(environ: Mapping[str, str], parallel: ParallelConfig) -> Iterator[str]:
    fsdp_offloads = _is_on(environ, _FSDP_VARIABLE) and _is_on(environ, "FSDP_OFFLOAD_PARAMS")
    if fsdp_offloads and not parallel.offloads_parameters:
        yield (
            "accelerate's configuration says fsdp_offload_params: true; the recipe keeps "
            "parameters on the GPU; set it to false, or set parallel.offload=parameters (fsdp2)."
        )
    if not _is_on(environ, _DEEPSPEED_VARIABLE):
        return
    for state in ("param", "optimizer"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{state.upper()}_DEVICE", "none")
        if device not in ("none", ""):
            yield (
                f"accelerate's configuration says offload_{state}_device: {device}; zero3 does not "
                "offload; set it to none, or use fsdp2 with parallel.offload=parameters."
            )


def _clipping_errors(environ: Mapping[str, str], train: TrainConfig) -> Iterator[str]:
    clipping = environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    max_grad_norm = train.max_grad_norm
    if _is_on(environ, _DEEPSPEED_VARIABLE) and clipping not in ("none", str(max_grad_norm)):
        yield (
            f"accelerate's configuration says gradient_clipping: {clipping}, the recipe "
            f"train.max_grad_norm={max_grad_norm}; make them agree, or remove gradient_clipping."
        )


def _precision_errors(environ: Mapping[str, str], precision: str) -> Iterator[str]:
    mixed_precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "no":  # accelerate's default, so not a choice of the user
        return
    if mixed_precision not in ("bf16", "fp16"):
        yield (
            f"accelerate's configuration says mixed_precision: {mixed_precision}; use bf16, fp16 "
            "or no."
        )
    elif precision not in ("auto", mixed_precision):
        yield (
            f"train.precision={precision}: accelerate's configuration says mixed_precision: "
            f"{mixed_precision}; make them agree, or set train.precision=auto or mixed_precision: "
            "no."
        )


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1", "yes")


def relaunch_if_ranks_were_lost(arguments: Sequence[str]) -> None:
    """Replace this process by torchrun if `accelerate launch` has dropped the other ranks.

    accelerate's single-process launcher sets MASTER_PORT if more than one process was requested,
    but no RANK. Only the command line of the parent process has the number of processes.

    Args:
        arguments: Command line of `python -m hqqtrain`.

    Raises:
        UserError: The number of processes cannot be determined.
    """
    launched = {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
    if not launched or "RANK" in os.environ:
        return
    num_processes = _read_num_processes()
    if num_processes is None:
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
    torchrun = [sys.executable, "-m", "hqqtrain.distributed.rendezvous"]
    torchrun += ["-m", "torch.distributed.run"]
    torchrun += ["--nproc_per_node", str(num_processes)]
    os.execv(sys.executable, [*torchrun, *master, "-m", "hqqtrain", *arguments])


def _read_num_processes() -> int | None:
    """Read --num_processes from the parent's command line; None if that is not possible."""
    try:
        parent = psutil.Process().parent()
        arguments = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    # Accept `--num_processes 2`, `--num-processes 2`, `--num_processes=2` and `-n 2`.
    for argument, next_argument in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, value = argument.replace("-", "_").partition("=")
        value = value or next_argument
        if flag in ("__num_processes", "_n") and value.isdigit():
            return int(value)
    return None
