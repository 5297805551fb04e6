"""The figures of a run for the model card of its adapter."""

from hqqtrain.rundir.schema import MODEL_NAMES
from hqqtrain.tasks.summary import RunSummary


def card_metrics(summary: RunSummary) -> dict[str, float]:
    """Return the figures of the evaluations so far, for the model card.

    The names are "perplexity, <model>" and the like. The distances of the full-precision model
    to itself are left out.
    """
    figures: dict[str, float | None] = {}
    rows = summary.table_rows()
    figures |= {f"perplexity, {row.model}": row.perplexity for row in rows}
    compared = [row for row in rows if row.model != MODEL_NAMES["full_precision"]]
    figures |= {f"KL, {row.model}": row.kl for row in compared}
    figures |= {f"top-1 agreement, {row.model}": row.top1_agreement for row in compared}
    return {name: value for name, value in figures.items() if value is not None}


def describe_protocol(summary: RunSummary) -> str:
    """Return how the perplexities are measured, as Markdown; empty if there are none."""
    evaluation = summary.content.eval
    if evaluation is None or evaluation.tokens is None:
        return ""
    return (
        f"`eval.protocol={evaluation.protocol}`, context {evaluation.context:,}, "
        f"stride {evaluation.stride:,}, {evaluation.tokens:,} predicted tokens"
    )
