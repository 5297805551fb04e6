"""One cluster for all tests that need a real Slurm. They run at the same time."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from at_once import start_all
from cluster import Cluster, why_unavailable


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """Start a cluster and the selected tests; skip, with the reason, if Slurm cannot be installed.

    The values are the outcomes of the tests, by name.
    """
    if reason := why_unavailable():
        pytest.skip(reason)
    selected = {item.name for item in request.session.items}
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    with start_all(selected, cluster, tmp_path_factory.mktemp) as started:
        yield started
