"""The tasks of `task=`: each reads as the story of what it does.

Every rank runs them alike; files, trackers and the console belong to the main rank, behind
`Record`. Whatever can be wrong with the user's input is found before anything is written.
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
    """Runs `config.task` to its end and returns the exit code; 0 at once where it is done.

    Raises:
        UserError: the configuration or the data are at fault (exit code 2).
        PreemptedError: it was asked to stop, and has saved its state (3).
    """
    relaunch_if_ranks_were_lost(command[3:])
    setup_logging(os.environ.get("RANK", "0") == "0")
    session = Session.start(config, Interrupt(config.run))
    try:
        with Record(session, command) as record:
            if not record.history.is_done():
                with explained(config):
                    _TASKS[config.task](session, record)
    except PreemptedError:  # which all ranks raise
        session.processes.leave()
        raise
    session.processes.leave()
    return 0


def finetune(session: Session, record: Record) -> None:
    """Quantize, adapt, train, measure, save; or go on with that from a checkpoint."""
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
    """Quantize and save."""
    with session.processes.together():
        plan = make_plan(session, adapt=False)
        _check_resources(plan, session)
    _build(plan, session, record)


def evaluate(session: Session, record: Record) -> None:
    """Measure a model as it is: quantized now or before, and with its adapter if there is one."""
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
    """Write dense weights, dequantized and merged with the adapter, as a Hugging Face folder."""
    with session.processes.together():
        plan = make_plan(session, adapt=False)
        _check_resources(plan, session)
    built = _build(plan, session, record)
    save_dense(plan, built, session, record.path("export"))


def _build(plan: Plan, session: Session, record: Record, found: Checkpoint | None = None) -> Built:
    """From what the run has quantized before, or the cache, or by quantizing."""
    own = Entry(record.path("quantized"), record.history.has_quantized())
    with nullcontext(own) if own.is_made else cached(plan, session) as entry:
        packed = entry.folder if entry and entry.is_made else None
        if packed:
            check_quantized(packed, session.processes)
        elif plan.packed:
            check_quantized(plan.source.path, session.processes, "Copy it again, or quantize anew.")
        with record.bars.quantizing(plan, loads=plan.packed or packed is not None) as on_layer:
            built = build(plan, session, packed=packed, on_layer=on_layer)
        if entry and entry.is_made:
            built.layer_errors, built.relative_error = entry.errors()
        elif entry:
            save_entry(entry, plan, built, session)
    record.quantized(plan, built, found)
    saves = session.config.quant.save and session.config.task in ("finetune", "quantize")
    if saves and not own.is_made:
        save_entry(own, plan, built, session)
    return built


_TASKS = {"finetune": finetune, "quantize": quantize, "eval": evaluate, "export": export}


def _check_resources(
    plan: Plan, session: Session, has_quantized: bool = False, found: Checkpoint | None = None
) -> None:
    """Refuses what cannot fit beside what is there already, warns of what may not."""
    config, processes = session.config, session.processes
    needs = estimate(
        config, plan.model, dtype=session.dtype, world_size=processes.size // session.replicas,
        strategy=session.strategy, on_gpu=session.device.type == "cuda",
        has_quantized=has_quantized, has_checkpoints=found is not None,
    )  # fmt: skip
    free = available(session.device, Path(config.run.root))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for warning in check_fits(needs, free, config, local_ranks=local_ranks):
        if processes.is_main:
            logger.warning(warning)
    if processes.is_main:
        logger.info("estimate: %s", needs)
