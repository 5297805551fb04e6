"""Tests that run at the same time, each in a thread.

The tests with a real Slurm mostly wait: for the scheduler, and for the delay of a requeued job. One
after another they would take minutes.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import Cluster

Test = Callable[[Cluster, Path], None]
_BODIES: dict[str, Test] = {}


def at_once(body: Test) -> Callable[..., None]:
    """Turn `body(cluster, folder)` into a test that runs at the same time as the others.

    Pytest shows the error of `body`, with the jobs of `folder` and the logs of the cluster.
    """
    name = body.__name__
    _BODIES[name] = body

    def wait(outcomes: Mapping[str, Future[None]]) -> None:
        outcomes[name].result()

    wait.__name__, wait.__qualname__, wait.__doc__ = name, name, body.__doc__
    wait.__module__ = body.__module__
    return wait


@contextmanager
def start_all(
    names: set[str], cluster: Cluster, new_folder: Callable[[str], Path]
) -> Iterator[dict[str, Future[None]]]:
    """Start those of the tests that are in `names`, and yield name -> outcome."""
    bodies = {name: body for name, body in _BODIES.items() if name in names}
    # The cluster ends first, and with it all that the threads may still wait for.
    with ThreadPoolExecutor(max(1, len(bodies))) as pool, cluster:
        yield {
            name: pool.submit(_run, body, cluster, new_folder(name))
            for name, body in bodies.items()
        }


def _run(body: Test, cluster: Cluster, folder: Path) -> Any:
    try:
        body(cluster, folder)
    except BaseException as error:
        error.add_note(cluster.report(folder))
        raise
