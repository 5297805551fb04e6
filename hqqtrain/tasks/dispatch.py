"""Run the task that `task=` selects.

Every rank runs the same steps. Only the main rank writes files and uses trackers and the console,
which `RunRecorder` hides. Errors in the configuration and data are found before anything is
written.
"""

import logging

from hqqtrain.common.env import get_rank
from hqqtrain.common.errors import PreemptedError
from hqqtrain.config.parallel import ParallelConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.distributed.failure import share_failure
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.data import show_data
from hqqtrain.tasks.export import export
from hqqtrain.tasks.finetune import finetune
from hqqtrain.tasks.generation import generate_texts
from hqqtrain.tasks.inference import evaluate, quantize
from hqqtrain.tasks.plan import show_plan
from hqqtrain.tasks.push import check_push, push_results
from hqqtrain.tasks.recorder import RunRecorder
from hqqtrain.tasks.resources import translate_resource_errors, workload_of
from hqqtrain.tracking.console import setup_logging

_TASKS = {
    "finetune": finetune, "quantize": quantize, "eval": evaluate, "export": export,
    "data": show_data, "generate": generate_texts, "plan": show_plan,
}  # fmt: skip


def dispatch_task(config: RunConfig, arguments: list[str]) -> int:
    """Run `config.task` to its end and return the exit code.

    Return 0 at once if an earlier process has finished this run.

    Args:
        config: The resolved configuration.
        arguments: The command-line arguments after `python -m hqqtrain`.

    Raises:
        UserError: The user must correct the configuration, the data or the machine (exit code 2).
        PreemptedError: The run was asked to stop and has saved its state (exit code 3).
    """
    setup_logging(get_rank() == 0)
    if config.task in ("data", "plan") and get_rank() == 0:  # this machine's backend has no use
        logging.getLogger("hqqtrain").setLevel(logging.WARNING)
    if not config.has_run_directory:
        return _run_without_directory(config, arguments)
    runtime = Runtime.start(_runtime_settings(config), PreemptionHandler(config.run))
    try:
        with RunRecorder(config, runtime, ["python", "-m", "hqqtrain", *arguments]) as recorder:
            check_push(config, recorder.directory.layout, runtime.comm)
            # A second look at data is a new one, even if the command is the same.
            if config.task == "data" or not recorder.history.is_done():
                with (
                    share_failure(runtime.comm),
                    translate_resource_errors(workload_of(config), runtime.strategy),
                ):
                    _TASKS[config.task](Run(config, runtime, recorder))
        push_results(config, runtime.comm, runtime.preemption)
    except PreemptedError:
        # All ranks raise this error, so all can meet in `shutdown`. After any other error a rank
        # may be missing, and waiting for it would hang.
        runtime.comm.shutdown()
        raise
    runtime.comm.shutdown()
    return 0


def _run_without_directory(config: RunConfig, arguments: list[str]) -> int:
    """Run a task that has no directory, in this process, and return the exit code."""
    runtime = Runtime.start(_runtime_settings(config), PreemptionHandler(config.run))
    recorder = RunRecorder(config, runtime, arguments)  # which is not entered: it writes nothing
    with translate_resource_errors(workload_of(config), runtime.strategy):
        _TASKS[config.task](Run(config, runtime, recorder))
    runtime.comm.shutdown()
    return 0


def _runtime_settings(config: RunConfig) -> RuntimeSettings:
    """Return the settings of the ranks. task=data and plan run no model, so they need no GPU."""
    if config.task in ("data", "plan"):
        return RuntimeSettings.of_any_machine(config.quant)
    # A training may be sharded, but a task without a directory runs in one process.
    parallel = config.parallel
    if not config.has_run_directory:  # a single process, which trains nothing
        parallel = ParallelConfig(offload="parameters" if parallel.offloads_parameters else "none")
    return RuntimeSettings(
        parallel, config.quant, config.adapter, config.train, config.optim,
        trains=config.task == "finetune",
    )  # fmt: skip
