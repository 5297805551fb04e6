"""The figures of a run for the model card of its adapter."""

from hqqtrain.rundir.schema import MODEL_NAMES, TASK_FACTS
from hqqtrain.tasks.summary import RunSummary


def card_metrics(summary: RunSummary) -> dict[str, float]:
    """Return the figures of the evaluations so far, for the model card.

    The names are "perplexity, <model>", "<task> <metric>, <model>" and the like. The distances of
    the full-precision model to itself are left out.
    """
    figures: dict[str, float | None] = {}
    rows = summary.table_rows()
    figures |= {f"perplexity, {row.model}": row.perplexity for row in rows}
    compared = [row for row in rows if row.model != MODEL_NAMES["full_precision"]]
    figures |= {f"KL, {row.model}": row.kl for row in compared}
    figures |= {f"top-1 agreement, {row.model}": row.top1_agreement for row in compared}
    for key, metrics in summary.content.measured_models().items():
        for task, values in (metrics.harness or {}).items():
            figures |= {
                f"{task} {name}, {MODEL_NAMES[key]}": value
                for name, value in values.items()
                if name not in TASK_FACTS
            }
    return {name: value for name, value in figures.items() if value is not None}


def describe_protocol(summary: RunSummary) -> str:
    """Return the text and the protocol of the perplexities, as Markdown; empty without any."""
    evaluation = summary.content.eval
    if evaluation is None or evaluation.tokens is None:
        return ""
    harness = evaluation.harness_version
    tasks = f". Tasks: lm-evaluation-harness {harness}, `eval.harness`" if harness else ""
    return (
        f"{evaluation.dataset}: `eval.protocol={evaluation.protocol}`, "
        f"context {evaluation.context:,}, stride {evaluation.stride:,}, "
        f"{evaluation.tokens:,} predicted tokens{tasks}"
    )
