"""The tasks that only measure: quantize and eval."""

import logging

from hqqtrain.inference.backends.registry import repack_linears
from hqqtrain.loading.model_builder import wrap_for_execution
from hqqtrain.loading.plan import plan_model
from hqqtrain.loading.source_digest import digest_source
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.tasks.calibration import load_calibration
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import batch_layout, check_same_text, load_held_out_data
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.harness import load_harness, run_harness
from hqqtrain.tasks.inference_backend import errors_name_the_key, inference_backend
from hqqtrain.tasks.model import check_fits_run, load_or_quantize, plan_settings

logger = logging.getLogger(__name__)


def quantize(run: Run) -> None:
    """Quantize the model and save it."""
    with run.runtime.comm.raise_on_all_ranks():
        plan = plan_model(plan_settings(run.config), run.runtime)
        check_fits_run(run, plan)
    if plan.initial_adapter and run.runtime.comm.is_main:
        logger.warning(
            "task=quantize: saves the quantized base only, without the adapter in %s; to keep both "
            "in one model, use task=export", plan.initial_adapter.folder,
        )  # fmt: skip
    load_or_quantize(run, plan, calibration=load_calibration(run, plan))


def evaluate(run: Run) -> None:
    """Evaluate the base without adapter and, if it has one, also with its adapter.

    The model is quantized first if its source is dense.
    """
    with run.runtime.comm.raise_on_all_ranks():
        backend = inference_backend(run)
        plan = plan_model(plan_settings(run.config), run.runtime)
    layout, harness = batch_layout(run.config, plan, run.runtime.comm), load_harness(run)
    held_out = load_held_out_data(run, plan.source.tokenizer, vocabulary_size(plan.model))
    with run.runtime.comm.raise_on_all_ranks():
        check_fits_run(run, plan)
    check_same_text(run, held_out)
    source_digest = digest_source(plan.source, run.runtime.comm, run.runtime.preemption)
    calibration = load_calibration(run, plan, held_out)
    loaded = load_or_quantize(run, plan, source_digest=source_digest, calibration=calibration)
    runnable = wrap_for_execution(loaded, run.runtime.strategy)
    if backend:
        with run.runtime.comm.raise_on_all_ranks(), errors_name_the_key():
            repack_linears(runnable.model, backend)
    evaluation = RecordedEvaluation(run, runnable, held_out, layout, source_digest)
    evaluation.evaluate_as(evaluation.base_key, adapted=False)
    run_harness(run, runnable, harness, evaluation.base_key, adapted=False)
    if plan.initial_adapter:
        evaluation.evaluate_as("final", adapted=True)
        run_harness(run, runnable, harness, "final", adapted=True)
