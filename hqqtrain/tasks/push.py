"""Push the results of a run to the Hub (`hub.push`), and check before the task that this will work.

The token and the repositories are checked before the task, which may take hours. The results are
pushed once the run is done, so a failure costs nothing: the same command finds a finished run, and
pushes what the Hub still lacks.
"""

from collections.abc import Callable
from dataclasses import asdict, replace

from hqqtrain.common.errors import UserError
from hqqtrain.config.hub import PUSHING_TASKS
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.heartbeat import Heartbeat
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.hub.repository import fingerprint_of
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.tasks.pushed_result import (
    Result,
    check_result,
    export_result,
    push_result,
    quantized_result,
    results_of_training,
)
from hqqtrain.tasks.pushed_run import PushedRun, hub_name


def check_push(config: RunConfig, layout: RunLayout, comm: Communicator) -> None:
    """Check the token, and create or check the repositories, before the task. Collective.

    Raises:
        UserError: A result could not be pushed.
    """

    def check() -> None:
        for result in results_to_push(config, layout):
            check_result(result, config.hub)

    if pushes(config):
        comm.run_on_rank0(check)


def push_results(config: RunConfig, comm: Communicator, preemption: PreemptionHandler) -> None:
    """Push the results of a finished run; rank 0 does, and the others wait. Collective.

    Raises:
        UserError: A result was not pushed. The run is complete, and the message says how to resume.
        PreemptedError: The run was asked to stop.
    """
    if not pushes(config):
        return
    with Heartbeat(comm) as heartbeat:  # an upload may outlast the time-out of a collective
        if comm.is_main:

            def check() -> None:
                preemption.check_local()
                heartbeat.check()

            with RunDirectory(config) as directory:
                _push_run(config, directory.layout, check)
        else:
            heartbeat.wait_for(0, preemption.check_local)


def pushes(config: RunConfig) -> bool:
    """Whether a run pushes its results."""
    return config.hub.push is not None and config.task in PUSHING_TASKS


def results_to_push(config: RunConfig, layout: RunLayout) -> list[Result]:
    """Return what a run pushes, in this order.

    Raises:
        UserError: The base of the adapter is not on the Hub.
    """
    name = config.hub.push
    assert name is not None
    if config.task == "quantize":
        return [quantized_result(layout.quantized, name)]
    if config.task == "export":
        return [export_result(layout.export, name)]
    if not config.quant.quantizes:
        return results_of_training(layout, config.hub, _dense_base(config))
    source = hub_name(asdict(config.model))
    if config.hub.base is None and source and fingerprint_of(source, f"hub.push={name}"):
        # The run has trained a base of the Hub, which needs no copy.
        return results_of_training(layout, replace(config.hub, base=source))
    return results_of_training(layout, config.hub)


def _push_run(config: RunConfig, layout: RunLayout, check: Callable[[], object]) -> None:
    """Push the results in a run directory; `check` may raise to stop."""
    run = PushedRun.read(layout.folder)
    again = "the same command"
    if config.run.resume == "never":
        again += " with run.resume=auto"
    advice = f"The run in {layout.folder} is complete: {again} pushes what is missing."
    for result in results_to_push(config, layout):
        private = [str(layout.folder), *run.paths]
        push_result(result, run, config.hub, private, check=check, advice=advice)


def _dense_base(config: RunConfig) -> str:
    """Return the repository of a base in full precision, which is not pushed."""
    base = config.hub.base or hub_name(asdict(config.model))
    if base is None:
        raise UserError(
            f"hub.push={config.hub.push}: the base of the adapter, model.name_or_path="
            f"{config.model.name_or_path}, is not on the Hub, so nobody else could load the "
            "adapter; set hub.base to the repository that has the same weights."
        )
    return base
