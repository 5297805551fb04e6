"""Evaluate the model of a run, and record the results.

`Evaluator` measures and writes nothing; this module connects it with the recorder.
"""

import logging
import math
from contextlib import nullcontext

from hqqtrain.data.packing import TokenSequences
from hqqtrain.evaluation.evaluator import Evaluator
from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.loading.model_builder import RunnableModel, build_reference
from hqqtrain.tasks.context import Run

logger = logging.getLogger(__name__)


class RecordedEvaluation:
    """Evaluates the model of a run and records every result.

    Without a held-out set (`eval.source=null`) its methods do nothing. The constructor loads the
    full-precision reference model, unless `eval.reference=off` or the source has packed weights
    only. Creating a `RecordedEvaluation` is a collective.

    Args:
        run: Settings of the evaluation, and the recorder.
        runnable: The model to evaluate.
        held_out: The held-out set, if any.
    """

    def __init__(self, run: Run, runnable: RunnableModel, held_out: TokenSequences | None) -> None:
        self._recorder, self._runnable = run.recorder, runnable
        self._evaluator: Evaluator | None = None
        if not held_out:
            return
        config, runtime = run.config, run.runtime
        reference = None
        if config.eval.reference == "resident" and not runnable.plan.is_packed:
            reference, bytes_read = build_reference(
                runnable.plan, runtime.strategy, runtime.dtype, runtime.preemption
            )
            run.recorder.record_reference_bytes(bytes_read)
        self._evaluator = Evaluator(
            held_out,
            runtime.comm,
            runtime.preemption,
            config.train.micro_batch_size,
            reference,
            runtime.autocast,
            run.recorder.progress_bars.show_evaluating,
        )

    def evaluate_as(self, model_key: str, *, adapted: bool) -> None:
        """Evaluate the model and record the result in the summary under `model_key`. Collective.

        Args:
            model_key: `quantized` or `final`.
            adapted: Whether the adapter is active.
        """
        if self._evaluator is None:
            return
        with nullcontext() if adapted else self._runnable.without_adapter():
            result = self._evaluator.evaluate(self._runnable.model)
        _warn_if_not_finite(model_key, result)
        self._recorder.record_evaluation(model_key, result)

    def evaluate_during_training(self) -> float | None:
        """Evaluate during training; record and return the loss in nats per token. Collective."""
        if self._evaluator is None:
            return None
        result = self._evaluator.evaluate(self._runnable.model)
        _warn_if_not_finite("trained", result)
        self._recorder.log_evaluation(result)
        return result.loss


def _warn_if_not_finite(model_key: str, result: EvalResult) -> None:
    """Warn about every measured number that is infinite or NaN, because nothing can be compared."""
    measured = {
        "the perplexity": result.perplexity,
        "the perplexity of the full-precision model": result.reference_perplexity,
        "the KL divergence": result.kl,
    }
    for name, value in measured.items():
        if value is not None and not math.isfinite(value):
            logger.warning(
                "%s model: %s on the held-out text is %s, so its figures mean nothing. Check the "
                "weights and train.precision; more bits (quant.nbits) help if only the quantized "
                "model is affected.",
                model_key, name, value,
            )  # fmt: skip
