"""Progress bars of a run: one at a time, for whatever the run is doing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.tracking.console import Console, ProgressBar


class ProgressBars:
    """The progress bars of a run on `console`."""

    def __init__(self, console: Console, runtime: Runtime) -> None:
        self._console, self._runtime = console, runtime
        self._training: ProgressBar | None = None

    @contextmanager
    def show_quantizing(self, layers: int, *, loads: bool) -> Iterator[Callable[[str], None]]:
        """Show a bar over the quantized layers, `layers` in number.

        With `loads`, the bar says that the layers are loaded, because they are packed already.

        Yields:
            A function to call with the name of each finished layer. It raises PreemptedError if
            this rank has received a signal.
        """
        verb = "loading" if loads else "quantizing"
        with self._console.progress_bar(verb, layers, "layer") as bar:

            def on_layer(name: str) -> None:
                bar.update(1, layer=name)
                self._runtime.preemption.check_local()

            yield on_layer

    @contextmanager
    def show_training(self, steps: int, done: int = 0) -> Iterator[None]:
        """Show a bar over the optimizer steps, of which an earlier process took `done`."""
        with self._console.progress_bar("training", steps, "step", done) as self._training:
            yield

    def advance_training(self, metrics: dict[str, float]) -> None:
        """Advance the training bar by one step and show its metrics."""
        if self._training:
            rate = metrics["train/tokens_per_second"]
            self._training.update(1, loss=metrics["train/loss"], **{"tokens/s": rate})

    @contextmanager
    def show_evaluating(self, held_out: TokenSequences) -> Iterator[Callable[[int], None]]:
        """Show a bar over this rank's share of the held-out tokens.

        Yields:
            A function to call with the number of tokens of each batch.
        """
        share = -(-held_out.target_token_count // self._runtime.comm.size)
        with self._console.progress_bar("evaluating", share, "token") as bar:
            yield bar.update
