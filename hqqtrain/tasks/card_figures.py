"""The figures of a run for the model cards of its results."""

from hqqtrain.rundir.schema import MODEL_NAMES, TASK_FACTS, Summary


def card_metrics(summary: Summary) -> dict[str, float]:
    """Return the figures of the evaluations so far, for a model card.

    The names are "perplexity, <model>", "<task> <metric>, <model>" and the like. The distances of
    the full-precision model to itself are left out.
    """
    models = summary.measured_models()
    compared = {key: metrics for key, metrics in models.items() if key != "full_precision"}
    figures: dict[str, float | None] = {}
    figures |= {f"perplexity, {MODEL_NAMES[key]}": m.perplexity for key, m in models.items()}
    figures |= {f"KL, {MODEL_NAMES[key]}": m.kl for key, m in compared.items()}
    figures |= {
        f"top-1 agreement, {MODEL_NAMES[key]}": m.top1_agreement for key, m in compared.items()
    }
    for key, metrics in models.items():
        for task, values in (metrics.harness or {}).items():
            figures |= {
                f"{task} {name}, {MODEL_NAMES[key]}": value
                for name, value in values.items()
                if name not in TASK_FACTS
            }
    return {name: value for name, value in figures.items() if value is not None}


def describe_protocol(summary: Summary) -> str:
    """Return the text and the protocol of the perplexities, as Markdown; empty without any."""
    evaluation = summary.eval
    if evaluation is None or evaluation.tokens is None:
        return ""
    harness = evaluation.harness_version
    tasks = f". Tasks: lm-evaluation-harness {harness}, `eval.harness`" if harness else ""
    return (
        f"{evaluation.dataset}: `eval.protocol={evaluation.protocol}`, "
        f"context {evaluation.context:,}, stride {evaluation.stride:,}, "
        f"{evaluation.tokens:,} predicted tokens{tasks}"
    )
