"""How far a run is, for a person: one bar at a time, whatever it is doing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hqqtrain.data.packing import TokenSequences
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.tracking.console import Console, ProgressBar


class ProgressBars:
    """The bars of a run, on `console`."""

    def __init__(self, console: Console, runtime: Runtime) -> None:
        self._console, self._runtime = console, runtime
        self._training: ProgressBar | None = None

    @contextmanager
    def quantizing(self, plan: ModelPlan, *, loads: bool) -> Iterator[Callable[[str], None]]:
        """Over the layers; yields what to call after each, where a signal is heard."""
        verb = "loading" if loads else "quantizing"
        with self._console.progress(verb, plan.layers, "layer") as bar:

            def on_layer(name: str) -> None:
                bar.update(1, layer=name)
                self._runtime.preemption.check_local()

            yield on_layer

    @contextmanager
    def training(self, steps: int, done: int = 0) -> Iterator[None]:
        """Over the steps, of which `done` were taken before."""
        with self._console.progress("training", steps, "step", done) as self._training:
            yield

    def step(self, metrics: dict[str, float]) -> None:
        """One more was taken."""
        if self._training:
            rate = metrics["train/tokens_per_second"]
            self._training.update(1, loss=metrics["train/loss"], **{"tokens/s": rate})

    @contextmanager
    def evaluating(self, held_out: TokenSequences) -> Iterator[Callable[[int], None]]:
        """Over this rank's share of the tokens; yields what to call per batch."""
        share = -(-held_out.tokens // self._runtime.comm.size)
        with self._console.progress("evaluating", share, "token") as bar:
            yield bar.update
