"""Evaluate a model before, during and after its training, always on the same held-out set."""

from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel

from hqqtrain.data import Sequences
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built, build_reference
from hqqtrain.tasks.record import Record
from hqqtrain.train.evaluation import Measured, evaluate
from hqqtrain.train.session import Session


class Scale:
    """Evaluator of a run: keeps the held-out set and the full-precision reference model.

    Without a held-out set (`eval.source=null`) its methods do nothing. The reference model is
    absent if `eval.reference=off`, or if the source has packed weights only.
    """

    def __init__(
        self,
        plan: Plan,
        built: Built,
        held_out: Sequences | None,
        session: Session,
        record: Record,
    ) -> None:
        self.built, self.held_out, self.session, self.record = built, held_out, session, record
        self.reference = None
        if held_out and session.config.eval.reference == "resident" and not plan.packed:
            self.reference, bytes_read = build_reference(plan, session)
            record.reference_read(bytes_read)
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

    def _evaluate(self, held_out: Sequences) -> Measured:
        """Evaluate the model.

        Raises:
            PreemptedError: The run was asked to stop; checked after every batch, raised on all
                ranks.
        """
        session = self.session
        with self.record.bars.evaluating(held_out) as advance, session.autocast():

            def on_batch(tokens: int) -> None:
                advance(tokens)
                session.interrupt.check(session.processes)

            return evaluate(
                self.built.model,
                held_out,
                session.processes,
                batch_size=session.config.train.micro_batch_size,
                reference=self.reference,
                on_batch=on_batch,
            )
