"""The tasks that train nothing: quantize, eval and export."""

from hqqtrain.formats.registry import FORMATS
from hqqtrain.loading.build import wrap_for_execution
from hqqtrain.loading.plan import plan_model
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import check_same_text, load_held_out_data
from hqqtrain.tasks.evaluation import RecordedEvaluation
from hqqtrain.tasks.model import check_fits_run, load_or_quantize, plan_settings
from hqqtrain.tasks.save import model_export


def quantize(run: Run) -> None:
    """Quantize the model and save it."""
    with run.runtime.comm.raise_on_all_ranks():
        plan = plan_model(plan_settings(run.config), run.runtime)
        check_fits_run(run, plan.model)
    load_or_quantize(run, plan)


def evaluate(run: Run) -> None:
    """Evaluate a model, quantized now or before; also with its adapter if it has one."""
    with run.runtime.comm.raise_on_all_ranks():
        plan = plan_model(plan_settings(run.config), run.runtime)
        held_out = load_held_out_data(run.config, plan.source.tokenizer)
        check_fits_run(run, plan.model)
    check_same_text(run, held_out)
    runnable = wrap_for_execution(load_or_quantize(run, plan), run.runtime.strategy)
    evaluation = RecordedEvaluation(run, runnable, held_out)
    evaluation.measure("quantized", adapted=False)
    if plan.start is not None:
        evaluation.measure("final", adapted=True)


def export(run: Run) -> None:
    """Write the model in `export.format`: dense with the adapter merged in, or packed."""
    export_format = FORMATS[run.config.export.format]
    with run.runtime.comm.raise_on_all_ranks():
        plan = plan_model(plan_settings(run.config), run.runtime)
        export_format.check_adapter(plan.start.folder if plan.start else None)
        check_fits_run(run, plan.model)
    loaded = load_or_quantize(run, plan)
    export_format.write(model_export(loaded, run.runtime), run.layout.export)
