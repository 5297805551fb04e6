"""Measures a model before, while and after it is trained, always on the same held-out text."""

from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel

from hqqtrain.data import Sequences
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built, build_reference
from hqqtrain.tasks.record import Record
from hqqtrain.train.evaluation import Measured, evaluate
from hqqtrain.train.session import Session


class Scale:
    """Holds what measuring needs: the text, and the full-precision model beside ours.

    Does nothing where there is no text (`eval.source=null`). There is no reference where
    `eval.reference=off` or where only packed weights exist.
    """

    def __init__(self, plan: Plan, built: Built, held_out: Sequences | None, session: Session,
                 record: Record) -> None:  # fmt: skip
        self.built, self.held_out, self.session, self.record = built, held_out, session, record
        self.reference = None
        if held_out and session.config.eval.reference == "resident" and not plan.packed:
            self.reference, bytes_read = build_reference(plan, session)
            record.reference_read(bytes_read)
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

    def _measured(self, held_out: Sequences) -> Measured:
        """A wish to stop is heard between batches: PreemptedError, on all ranks."""
        session = self.session
        with self.record.bars.evaluating(held_out) as count, session.autocast():

            def on_batch(tokens: int) -> None:
                count(tokens)
                session.interrupt.check(session.processes)

            return evaluate(
                self.built.model, held_out, self.session.processes,
                batch_size=self.session.config.train.micro_batch_size,
                reference=self.reference, on_batch=on_batch,
            )  # fmt: skip
