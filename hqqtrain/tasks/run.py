"""The tasks of `task=`; each function lists the steps of one task in order.

Every rank runs the same steps. Only the main rank writes files and uses trackers and the console,
which `RunRecorder` hides. Every fault of the user's input is found before anything is written.
"""

import logging
import os
from contextlib import nullcontext
from pathlib import Path

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.resume import check_resumable, find_checkpoint
from hqqtrain.common.errors import PreemptedError
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import relaunch_if_ranks_were_lost
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.evaluator import Evaluator
from hqqtrain.formats.packed import check_quantized
from hqqtrain.formats.registry import FORMATS
from hqqtrain.loading.build import LoadedModel, build_model, wrap_for_execution
from hqqtrain.loading.cache import CacheEntry, cache_entry, save_cache_entry
from hqqtrain.loading.memory_available import available_memory
from hqqtrain.loading.memory_check import check_fits
from hqqtrain.loading.memory_estimate import estimate_memory
from hqqtrain.loading.plan import ModelPlan, plan_model
from hqqtrain.tasks.datasets import check_same_text, load_held_out_data, load_training_data
from hqqtrain.tasks.recorder import RunRecorder
from hqqtrain.tasks.resource_errors import translate_resource_errors
from hqqtrain.tasks.save import model_export, save_trained_adapter
from hqqtrain.tasks.training import train_adapters
from hqqtrain.tracking.console import setup_logging

logger = logging.getLogger(__name__)


def run_task(config: RunConfig, command: list[str]) -> int:
    """Run `config.task` to its end and return the exit code.

    Return 0 at once if an earlier process has finished this run.

    Args:
        config: The resolved configuration.
        command: The command line, for the run directory and for a relaunch.

    Raises:
        UserError: The configuration or the data have a fault (exit code 2).
        PreemptedError: The run was asked to stop and has saved its state (exit code 3).
    """
    relaunch_if_ranks_were_lost(command[3:])
    setup_logging(os.environ.get("RANK", "0") == "0")
    runtime = Runtime.start(config, PreemptionHandler(config.run))
    try:
        with RunRecorder(runtime, command) as recorder:
            if not recorder.history.is_done():
                with translate_resource_errors(config):
                    _TASKS[config.task](runtime, recorder)
    except PreemptedError:  # raised on all ranks, so all ranks leave together
        runtime.comm.leave()
        raise
    runtime.comm.leave()
    return 0


def finetune(runtime: Runtime, recorder: RunRecorder) -> None:
    """Quantize the model, train adapters, evaluate and save; or resume that from a checkpoint."""
    config = runtime.config
    found, has_quantized = find_checkpoint(recorder, runtime), recorder.history.has_quantized()
    with runtime.comm.raise_on_all_ranks():
        plan = plan_model(runtime, adapt=True, resumed=found.folder if found else None)
        training, held_out = load_training_data(plan, runtime), load_held_out_data(plan, runtime)
        check_resumable(found, training, held_out, config)
        _check_resources(plan, runtime, has_quantized, found)
    check_same_text(runtime, training, held_out)
    recorder.history.forget()
    loaded = _build(plan, runtime, recorder, found)
    loaded.model = wrap_for_execution(loaded.model, runtime)
    scale = Evaluator(plan, loaded, held_out, runtime, recorder)
    if not recorder.has_evaluated("quantized"):
        scale.measure("quantized", adapted=False)
    trainer = train_adapters(plan, loaded, training, scale, runtime, recorder, found)
    recorder.trained(trainer.done, list(trainer.trained.values()))
    scale.measure("final", adapted=True)
    save_trained_adapter(plan, loaded, runtime, recorder)


def quantize(runtime: Runtime, recorder: RunRecorder) -> None:
    """Quantize the model and save it."""
    with runtime.comm.raise_on_all_ranks():
        plan = plan_model(runtime, adapt=False)
        _check_resources(plan, runtime)
    _build(plan, runtime, recorder)


def evaluate(runtime: Runtime, recorder: RunRecorder) -> None:
    """Evaluate a model, quantized now or before; also with its adapter if it has one."""
    with runtime.comm.raise_on_all_ranks():
        plan = plan_model(runtime, adapt=False)
        held_out = load_held_out_data(plan, runtime)
        _check_resources(plan, runtime)
    check_same_text(runtime, held_out)
    loaded = _build(plan, runtime, recorder)
    loaded.model = wrap_for_execution(loaded.model, runtime)
    scale = Evaluator(plan, loaded, held_out, runtime, recorder)
    scale.measure("quantized", adapted=False)
    if plan.start is not None:
        scale.measure("final", adapted=True)


def export(runtime: Runtime, recorder: RunRecorder) -> None:
    """Write the model in `export.format`: dense with the adapter merged in, or packed."""
    export_format = FORMATS[runtime.config.export.format]
    with runtime.comm.raise_on_all_ranks():
        plan = plan_model(runtime, adapt=False)
        export_format.check_adapter(plan.start.folder if plan.start else None)
        _check_resources(plan, runtime)
    loaded = _build(plan, runtime, recorder)
    export_format.write(model_export(plan, loaded, runtime), recorder.path("export"))


def _build(
    plan: ModelPlan, runtime: Runtime, recorder: RunRecorder, found: Checkpoint | None = None
) -> LoadedModel:
    """Load the model of `plan` without quantizing twice, and save its packed weights. Collective.

    The packed weights come from the first of these that exists:

    1. `quantized/` of the run directory, which an earlier process of this run has saved;
    2. the source of the plan, if it is packed;
    3. the entry of `quant.cache_dir`, which another run with the same settings has saved;
    4. quantizing the dense source. The result then becomes the entry of `quant.cache_dir`, if set.

    Args:
        plan: The plan; its `model` becomes the loaded one.
        session: Configuration and processes of the run.
        record: Begins the run directory, or resumes it as `found`.
        found: The training checkpoint that the run resumes from.
    """
    # `entry` is a folder of packed weights that exists or that this run is to make. It is the
    # run's own folder (case 1), an entry of the cache (cases 3 and 4), or None (case 2, or case 4
    # without a cache). While the block runs, a cache entry that does not exist yet is locked.
    own = CacheEntry(recorder.path("quantized"), recorder.history.has_quantized())
    with nullcontext(own) if own.is_made else cache_entry(plan, runtime) as entry:
        # Verify the checksums of packed weights before anything is read from them.
        packed = entry.folder if entry and entry.is_made else None
        if packed:
            check_quantized(packed, runtime.comm)
        elif plan.packed:
            fix = "Copy it again, or quantize again."
            check_quantized(plan.source.path, runtime.comm, fix)
        # Load the packed weights, or read the dense ones and quantize them.
        with recorder.bars.quantizing(plan, loads=plan.packed or packed is not None) as on_layer:
            loaded = build_model(plan, runtime, packed=packed, on_layer=on_layer)
        # Quantization errors need the dense weights. They are saved with the packed weights, and
        # come from there if nothing was quantized now.
        if entry and entry.is_made:
            loaded.layer_errors, loaded.relative_error = entry.errors()
        elif entry:
            save_cache_entry(entry, plan, loaded, runtime)
    # From here on the run directory exists: bad weights have raised above and leave nothing behind.
    recorder.quantized(plan, loaded, found)
    # Give the run directory its own copy, so that the run can resume and be used without the cache.
    saves = runtime.config.quant.save and runtime.config.task in ("finetune", "quantize")
    if saves and not own.is_made:
        save_cache_entry(own, plan, loaded, runtime)
    return loaded


_TASKS = {"finetune": finetune, "quantize": quantize, "eval": evaluate, "export": export}


def _check_resources(
    plan: ModelPlan, runtime: Runtime, has_quantized: bool = False, found: Checkpoint | None = None
) -> None:
    """Estimate memory and disk space; refuse the run if it cannot fit, warn if it may not.

    Args:
        plan: The planned model.
        session: Configuration, device and strategy of the run.
        has_quantized: Whether `quantized/` is on disk already and needs no further space.
        found: The checkpoint to resume from; its space is likewise taken already.

    Raises:
        UserError: The run does not fit.
    """
    config, comm = runtime.config, runtime.comm
    needs = estimate_memory(
        config,
        plan.model,
        dtype=runtime.dtype,
        world_size=comm.size // runtime.replicas,
        strategy=runtime.strategy,
        on_gpu=runtime.device.type == "cuda",
        has_quantized=has_quantized,
        has_checkpoints=found is not None,
    )
    free = available_memory(runtime.device, Path(config.run.root))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for warning in check_fits(needs, free, config, local_ranks=local_ranks):
        if comm.is_main:
            logger.warning(warning)
    if comm.is_main:
        logger.info("estimate: %s", needs)
