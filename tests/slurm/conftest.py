"""One cluster for all tests that need a real Slurm."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, why_unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster; skip the test, with the reason, if Slurm cannot be installed."""
    if reason := why_unavailable():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started
