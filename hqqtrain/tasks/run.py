"""The tasks of `task=`; each function lists the steps of one task in order.

Every rank runs the same steps. Only the main rank writes files and uses trackers and the console,
which `Record` hides. Every fault of the user's input is found before anything is written.
"""

import logging
import os
from contextlib import nullcontext
from pathlib import Path

from hqqtrain.ckpt import Checkpoint, check_quantized
from hqqtrain.config import PreemptedError, RunConfig
from hqqtrain.dist import relaunch_if_ranks_were_lost
from hqqtrain.models import available, check_fits, estimate
from hqqtrain.tasks.cache import Entry, cached, save_entry
from hqqtrain.tasks.faults import explained
from hqqtrain.tasks.measure import Scale
from hqqtrain.tasks.plan import Plan, make_plan
from hqqtrain.tasks.prepare import Built, build, mount
from hqqtrain.tasks.record import Record
from hqqtrain.tasks.resume import check_goes_on, find_checkpoint
from hqqtrain.tasks.save import save_adapter_of, save_dense
from hqqtrain.tasks.texts import check_same_text, held_out_data, training_data
from hqqtrain.tasks.training import train
from hqqtrain.track import setup_logging
from hqqtrain.train.interrupt import Interrupt
from hqqtrain.train.session import Session

logger = logging.getLogger(__name__)


def run(config: RunConfig, command: list[str]) -> int:
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
    session = Session.start(config, Interrupt(config.run))
    try:
        with Record(session, command) as record:
            if not record.history.is_done():
                with explained(config):
                    _TASKS[config.task](session, record)
    except PreemptedError:  # raised on all ranks, so all ranks leave together
        session.processes.leave()
        raise
    session.processes.leave()
    return 0


def finetune(session: Session, record: Record) -> None:
    """Quantize the model, train adapters, evaluate and save; or resume that from a checkpoint."""
    config = session.config
    found, has_quantized = find_checkpoint(record, session), record.history.has_quantized()
    with session.processes.together():
        plan = make_plan(session, adapt=True, resumed=found.folder if found else None)
        training, held_out = training_data(plan, session), held_out_data(plan, session)
        check_goes_on(found, training, held_out, config)
        _check_resources(plan, session, has_quantized, found)
    check_same_text(session, training, held_out)
    record.history.forget()
    built = _build(plan, session, record, found)
    built.model = mount(built.model, session)
    scale = Scale(plan, built, held_out, session, record)
    if not record.has_measured("quantized"):
        scale.measure("quantized", adapted=False)
    trainer = train(plan, built, training, scale, session, record, found)
    record.trained(trainer.done, list(trainer.trained.values()))
    scale.measure("final", adapted=True)
    save_adapter_of(plan, built, session, record)


def quantize(session: Session, record: Record) -> None:
    """Quantize the model and save it."""
    with session.processes.together():
        plan = make_plan(session, adapt=False)
        _check_resources(plan, session)
    _build(plan, session, record)


def evaluate(session: Session, record: Record) -> None:
    """Evaluate a model, quantized now or before; also with its adapter if it has one."""
    with session.processes.together():
        plan = make_plan(session, adapt=False)
        held_out = held_out_data(plan, session)
        _check_resources(plan, session)
    check_same_text(session, held_out)
    built = _build(plan, session, record)
    built.model = mount(built.model, session)
    scale = Scale(plan, built, held_out, session, record)
    scale.measure("quantized", adapted=False)
    if plan.start is not None:
        scale.measure("final", adapted=True)


def export(session: Session, record: Record) -> None:
    """Write a dense Hugging Face checkpoint: dequantized weights with the adapter merged in."""
    with session.processes.together():
        plan = make_plan(session, adapt=False)
        _check_resources(plan, session)
    built = _build(plan, session, record)
    save_dense(plan, built, session, record.path("export"))


def _build(plan: Plan, session: Session, record: Record, found: Checkpoint | None = None) -> Built:
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
    own = Entry(record.path("quantized"), record.history.has_quantized())
    with nullcontext(own) if own.is_made else cached(plan, session) as entry:
        # Verify the checksums of packed weights before anything is read from them.
        packed = entry.folder if entry and entry.is_made else None
        if packed:
            check_quantized(packed, session.processes)
        elif plan.packed:
            fix = "Copy it again, or quantize again."
            check_quantized(plan.source.path, session.processes, fix)
        # Load the packed weights, or read the dense ones and quantize them.
        with record.bars.quantizing(plan, loads=plan.packed or packed is not None) as on_layer:
            built = build(plan, session, packed=packed, on_layer=on_layer)
        # Quantization errors need the dense weights. They are saved with the packed weights, and
        # come from there if nothing was quantized now.
        if entry and entry.is_made:
            built.layer_errors, built.relative_error = entry.errors()
        elif entry:
            save_entry(entry, plan, built, session)
    # From here on the run directory exists: bad weights have raised above and leave nothing behind.
    record.quantized(plan, built, found)
    # Give the run directory its own copy, so that the run can resume and be used without the cache.
    saves = session.config.quant.save and session.config.task in ("finetune", "quantize")
    if saves and not own.is_made:
        save_entry(own, plan, built, session)
    return built


_TASKS = {"finetune": finetune, "quantize": quantize, "eval": evaluate, "export": export}


def _check_resources(
    plan: Plan, session: Session, has_quantized: bool = False, found: Checkpoint | None = None
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
    config, processes = session.config, session.processes
    needs = estimate(
        config,
        plan.model,
        dtype=session.dtype,
        world_size=processes.size // session.replicas,
        strategy=session.strategy,
        on_gpu=session.device.type == "cuda",
        has_quantized=has_quantized,
        has_checkpoints=found is not None,
    )
    free = available(session.device, Path(config.run.root))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for warning in check_fits(needs, free, config, local_ranks=local_ranks):
        if processes.is_main:
            logger.warning(warning)
    if processes.is_main:
        logger.info("estimate: %s", needs)
