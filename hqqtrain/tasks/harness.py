"""Measure the model of a run on the tasks of `eval.harness`, and record the figures."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

from hqqtrain.common.errors import UserError
from hqqtrain.evaluation.harness import HarnessTask, TaskFigures, evaluate_task, load_tasks
from hqqtrain.loading.model_builder import RunnableModel
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.rundir.schema import MODEL_NAMES, TASK_FACTS
from hqqtrain.tasks.context import Run

logger = logging.getLogger(__name__)


def load_harness(run: Run) -> list[HarnessTask]:
    """Load the tasks of `eval.harness` with their data, before any long work. Collective.

    Raises:
        UserError: lm_eval is not installed, a task is unknown or cannot be loaded, or the strategy
            shards the model.
    """
    names, strategy = run.config.eval.harness, run.runtime.strategy
    with run.runtime.comm.raise_on_all_ranks():
        if names and strategy.shards_parameters:
            raise UserError(
                f"eval.harness=[{','.join(names)}]: the ranks share the documents of a task, for "
                f"which each needs the whole model, but parallel.strategy={strategy.name} shards "
                "it; use parallel.strategy=ddp, or run task=eval on this run in one process."
            )
        if names and run.runtime.comm.is_main:
            logger.info("eval.harness: loading the data of %s", ", ".join(names))
        return load_tasks(names) if names else []


def run_harness(
    run: Run,
    runnable: RunnableModel,
    tasks: Sequence[HarnessTask],
    model_key: str,
    *,
    adapted: bool,
) -> None:
    """Measure the model on every task, and record the figures under `model_key`. Collective.

    Args:
        run: The run.
        runnable: The model, which was evaluated as `model_key` before.
        tasks: The tasks.
        model_key: A key of `MODEL_NAMES`.
        adapted: Whether the adapter is active.

    Raises:
        UserError: A task does not fit the model.
        PreemptedError: A rank was asked to stop. Several ranks look after every task only, because
            they have different numbers of batches.
    """
    runtime = run.runtime
    tokenizer = load_tokenizer(runnable.plan.source.tokenizer)

    def on_batch() -> None:
        if runtime.comm.size == 1:
            runtime.preemption.check(runtime.comm)

    for task in tasks:
        runtime.preemption.check(runtime.comm)
        with nullcontext() if adapted else runnable.without_adapter(), runtime.autocast():
            figures = evaluate_task(
                runnable.model,
                runnable.plan.hf_config,
                tokenizer,
                task,
                runtime.comm,
                batch_size=run.config.train.micro_batch_size,
                on_batch=on_batch,
            )
        run.recorder.record_harness(model_key, figures)
        _log(model_key, figures)


def _log(model_key: str, figures: TaskFigures) -> None:
    """Log a line for every task, as `quantized model: arc_easy: acc 0.3210 +- 0.0096`."""
    for task, values in figures.items():
        shown = [
            f"{name} {value:.4f}"
            + (f" +- {values[f'{name}_stderr']:.4f}" if f"{name}_stderr" in values else "")
            for name, value in values.items()
            if name not in TASK_FACTS and not name.partition(",")[0].endswith("_stderr")
        ]
        logger.info("%s model: %s: %s", MODEL_NAMES[model_key], task, ", ".join(shown))
