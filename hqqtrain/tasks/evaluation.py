"""Evaluation of a task: measures the model and records the figures."""

from contextlib import nullcontext

from hqqtrain.data.packing import TokenSequences
from hqqtrain.evaluation.evaluator import Evaluator
from hqqtrain.loading.model_builder import RunnableModel, build_reference
from hqqtrain.tasks.context import Run


class RecordedEvaluation:
    """Evaluates the model of a run and records every result.

    Without a held-out set (`eval.source=null`) its methods do nothing. The full-precision reference
    model is absent if `eval.reference=off`, or if the source has packed weights only.

    Args:
        run: Settings of the evaluation, and the recorder. Creating a `RecordedEvaluation` is a
            collective that loads the reference model.
        runnable: The model.
        held_out: The held-out set, if any.
    """

    def __init__(self, run: Run, runnable: RunnableModel, held_out: TokenSequences | None) -> None:
        self._recorder, self._runnable = run.recorder, runnable
        self._evaluator: Evaluator | None = None
        if not held_out:
            return
        config, runtime, reference = run.config, run.runtime, None
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

    def evaluate_as(self, part: str, *, adapted: bool) -> None:
        """Evaluate the model and record it as `part` of the summary. Collective.

        Args:
            part: `quantized` or `final`.
            adapted: Whether the adapter takes part.
        """
        if self._evaluator is None:
            return
        with nullcontext() if adapted else self._runnable.without_adapter():
            self._recorder.record_evaluation(part, self._evaluator.evaluate(self._runnable.model))

    def evaluate_during_training(self) -> float | None:
        """Evaluate during training; record and return the loss in nats per token. Collective."""
        if self._evaluator is None:
            return None
        measured = self._evaluator.evaluate(self._runnable.model)
        self._recorder.log_evaluation(measured)
        return measured.loss
