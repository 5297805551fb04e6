"""Measures a model before, while and after it is trained, always on the same held-out text."""

from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel

from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity
from hqqtrain.loading.build import LoadedModel, build_reference
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.tasks.recorder import RunRecorder


class Evaluator:
    """Holds what measuring needs: the text, and the full-precision model beside ours.

    Does nothing where there is no text (`eval.source=null`). There is no reference where
    `eval.reference=off` or where only packed weights exist.
    """

    def __init__(self, plan: ModelPlan, loaded: LoadedModel, held_out: TokenSequences | None, runtime: Runtime,
                 recorder: RunRecorder) -> None:  # fmt: skip
        self.built, self.held_out, self.runtime, self.record = loaded, held_out, runtime, recorder
        self.reference = None
        if held_out and runtime.config.eval.reference == "resident" and not plan.packed:
            self.reference, bytes_read = build_reference(plan, runtime)
            recorder.reference_read(bytes_read)
        self.adapter_counts = plan.start is not None  # a fresh one changes nothing yet

    def measure(self, part: str, *, adapted: bool) -> None:
        """Measures and records `part` of the summary, `quantized` or `final`."""
        if not self.held_out:
            return
        model = self.built.model
        as_it_is: AbstractContextManager = nullcontext()
        if self.adapter_counts and not adapted and isinstance(model, PeftModel):
            as_it_is = model.disable_adapter()
        with as_it_is:
            self.record.evaluated(part, self._measured(self.held_out))

    def measure_between(self) -> float | None:
        """Measures while training goes on, for the curve; the loss, nats a token."""
        if not self.held_out:
            return None
        measured = self._measured(self.held_out)
        self.record.evaluated_between(measured)
        return measured.loss

    def _measured(self, held_out: TokenSequences) -> EvalResult:
        """A wish to stop is heard between batches: PreemptedError, on all ranks."""
        runtime = self.runtime
        with self.record.bars.evaluating(held_out) as count, runtime.autocast():

            def on_batch(tokens: int) -> None:
                count(tokens)
                runtime.preemption.check(runtime.comm)

            return evaluate_perplexity(
                self.built.model, held_out, self.runtime.comm,
                batch_size=self.runtime.config.train.micro_batch_size,
                reference=self.reference, on_batch=on_batch,
            )  # fmt: skip
