"""Evaluate a model before, during and after its training, always on the same held-out set."""

from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel

from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity
from hqqtrain.loading.build import LoadedModel, build_reference
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.tasks.recorder import RunRecorder


class Evaluator:
    """Evaluator of a run: keeps the held-out set and the full-precision reference model.

    Without a held-out set (`eval.source=null`) its methods do nothing. The reference model is
    absent if `eval.reference=off`, or if the source has packed weights only.
    """

    def __init__(
        self,
        plan: ModelPlan,
        loaded: LoadedModel,
        held_out: TokenSequences | None,
        runtime: Runtime,
        recorder: RunRecorder,
    ) -> None:
        self.built, self.held_out, self.runtime, self.record = loaded, held_out, runtime, recorder
        self.reference = None
        if held_out and runtime.config.eval.reference == "resident" and not plan.packed:
            self.reference, bytes_read = build_reference(plan, runtime)
            recorder.reference_read(bytes_read)
        self.adapter_counts = plan.start is not None
        """Whether the adapter changes the output from the beginning; a fresh one does not."""

    def measure(self, part: str, *, adapted: bool) -> None:
        """Evaluate the model and record it as `part` of the summary. Collective.

        Args:
            part: `quantized` or `final`.
            adapted: Whether the adapter takes part.
        """
        if not self.held_out:
            return
        model = self.built.model
        adapter_state: AbstractContextManager = nullcontext()
        if self.adapter_counts and not adapted and isinstance(model, PeftModel):
            adapter_state = model.disable_adapter()
        with adapter_state:
            self.record.evaluated(part, self._evaluate(self.held_out))

    def measure_between(self) -> float | None:
        """Evaluate during training; record and return the loss in nats per token. Collective."""
        if not self.held_out:
            return None
        measured = self._evaluate(self.held_out)
        self.record.evaluated_between(measured)
        return measured.loss

    def _evaluate(self, held_out: TokenSequences) -> EvalResult:
        """Evaluate the model.

        Raises:
            PreemptedError: The run was asked to stop; checked after every batch, raised on all
                ranks.
        """
        runtime = self.runtime
        with self.record.bars.evaluating(held_out) as advance, runtime.autocast():

            def on_batch(tokens: int) -> None:
                advance(tokens)
                runtime.preemption.check(runtime.comm)

            return evaluate_perplexity(
                self.built.model,
                held_out,
                runtime.comm,
                batch_size=runtime.config.train.micro_batch_size,
                reference=self.reference,
                on_batch=on_batch,
            )
