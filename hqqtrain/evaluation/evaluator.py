"""Evaluate a model on one held-out set: before, during and after its training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from hqqtrain.data.layout import PACKED, BatchLayout
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.evaluation.continuations import continue_greedily
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity

ShowProgress = Callable[[TokenSequences], AbstractContextManager[Callable[[int], object]]]
"""Opens a progress bar. The context yields a function that takes the token count of each batch."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on its held-out set, always with the same settings.

    Attributes:
        held_out: The tokenized held-out set, the same on all ranks.
        comm: All ranks of the run.
        preemption: Knows whether a rank was asked to stop.
        batch_size: Sequences per batch and rank.
        reference: The full-precision model, if the KL divergence to it is measured.
        autocast: Makes the context of the forward passes.
        layout: Which texts may share a batch.
        counts_first: As for `evaluate_perplexity`.
        show_progress: Opens a bar that shows how many tokens all ranks have evaluated.
    """

    held_out: TokenSequences
    comm: Communicator
    preemption: PreemptionHandler
    batch_size: int
    reference: nn.Module | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext
    layout: BatchLayout = PACKED
    counts_first: bool = False
    show_progress: ShowProgress = lambda _: nullcontext(lambda _: None)

    def continue_texts(
        self, model: nn.Module, prompts: Sequence[Tensor], new_tokens: int
    ) -> Tensor:
        """Return the most likely continuations, int64 [n, at most `new_tokens`]. Collective.

        Args:
            model: The model.
            prompts: The beginnings of n texts, each int64 [length].
            new_tokens: Tokens per prompt.

        Raises:
            PreemptedError: As in `evaluate`; checked after every token.
        """
        with self.autocast():
            return continue_greedily(
                model,
                prompts,
                self.comm,
                new_tokens=new_tokens,
                on_token=lambda: self.preemption.check(self.comm),
            )

    def evaluate(self, model: nn.Module) -> EvalResult:
        """Evaluate `model`. Collective.

        Raises:
            PreemptedError: The run was asked to stop; checked after every batch, raised on all
                ranks.
        """
        with self.show_progress(self.held_out) as advance, self.autocast():

            def on_batch(tokens: int) -> None:
                advance(tokens)
                self.preemption.check(self.comm)

            return evaluate_perplexity(
                model,
                self.held_out,
                self.comm,
                batch_size=self.batch_size,
                reference=self.reference,
                layout=self.layout,
                counts_first=self.counts_first,
                on_batch=on_batch,
            )
