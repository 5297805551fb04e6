"""The progress bars of a run, which shows one at a time."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import length_hint
from typing import TypeVar

from hqqtrain.data.sequences import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.tracking.console import Console, ProgressBar

T = TypeVar("T")

TOKENIZING_SECONDS = 3.0
"""Seconds until a bar shows the progress of the tokenizer."""


class ProgressBars:
    """The progress bars of a run on `console`."""

    def __init__(self, console: Console, runtime: Runtime) -> None:
        self._console, self._runtime = console, runtime
        self._training: ProgressBar | None = None

    @contextmanager
    def show_quantizing(self, layer_count: int, *, loads: bool) -> Iterator[Callable[[str], None]]:
        """Show a bar that counts the quantized linear layers.

        Args:
            layer_count: Number of layers.
            loads: Whether the bar says "loading", because the layers are packed already or stay
                dense.

        Yields:
            A function to call with the name of each finished layer. It raises PreemptedError if
            this rank has received a signal.
        """
        verb = "loading" if loads else "quantizing"
        with self._console.progress_bar(verb, layer_count, "layer") as bar:

            def on_layer(name: str) -> None:
                bar.update(1, layer=name)
                self._runtime.preemption.check_local()

            yield on_layer

    @contextmanager
    def show_streaming(self, layer_count: int) -> Iterator[Callable[[], None]]:
        """Show a bar that counts the decoder layers of a streamed full-precision model.

        Yields:
            A function to call after each layer. It raises PreemptedError if this rank has received
            a signal.
        """
        with self._console.progress_bar("full precision", layer_count, "layer") as bar:

            def on_layer() -> None:
                bar.update()
                self._runtime.preemption.check_local()

            yield on_layer

    def count_tokenized(self, examples: Iterable[T]) -> Iterator[T]:
        """Yield examples that are tokenized meanwhile, and count them on a bar.

        The bar appears after some seconds: most data take less, and need none.
        """
        start, done, bar = time.monotonic(), 0, None
        with ExitStack() as stack:
            for example in examples:
                if not bar and time.monotonic() - start > TOKENIZING_SECONDS:
                    total = length_hint(examples) or None
                    bar = self._console.progress_bar("tokenizing", total, "example", done)
                    stack.enter_context(bar)
                yield example
                done += 1
                if bar:
                    bar.update()

    @contextmanager
    def show_training(self, total_steps: int, steps_taken: int = 0) -> Iterator[None]:
        """Show a bar that counts optimizer steps; earlier processes have taken `steps_taken`."""
        bar = self._console.progress_bar("training", total_steps, "step", steps_taken)
        with bar as self._training:
            yield

    def advance_training(self, metrics: dict[str, float]) -> None:
        """Advance the training bar by one step and show its metrics."""
        if self._training:
            tokens_per_second = metrics["train/tokens_per_second"]
            self._training.update(1, loss=metrics["train/loss"], **{"tokens/s": tokens_per_second})

    @contextmanager
    def show_evaluating(self, held_out: TokenSequences) -> Iterator[Callable[[int], None]]:
        """Show a bar over the held-out tokens of all ranks.

        Yields:
            A function to call with the number of tokens of each batch, summed over all ranks.
        """
        tokens = held_out.target_token_count
        with self._console.progress_bar("evaluating", tokens, "token") as bar:
            yield bar.update
