"""The metrics of an optimizer step, by the names that trackers show."""

from hqqtrain.train.state import StepResult


def step_metrics(
    step: StepResult, *, epoch: float, mfu_per_token_rate: float | None
) -> dict[str, float]:
    """Return the metrics of a step that was taken.

    Args:
        step: The step.
        epoch: Passes over the data up to and including the step.
        mfu_per_token_rate: MFU of one token per second, as `mfu_per_token_rate` returns it; None if
            it is unknown.
    """
    tokens_per_second = step.tokens / step.seconds
    metrics = {
        "train/loss": step.loss,
        "train/grad_norm": step.grad_norm,
        "train/learning_rate": step.learning_rate,
        "train/epoch": epoch,
        "train/global_step": step.number,
        "train/tokens_per_second": tokens_per_second,
    }
    if mfu_per_token_rate:
        metrics["train/mfu"] = tokens_per_second * mfu_per_token_rate
    return metrics | {"memory/peak_gib": step.peak_memory_gib}
