"""The registry and the configuration agree on the solvers."""

from hqqtrain.config import quant
from hqqtrain.quant.solvers.registry import SOLVERS


def test_the_configuration_allows_the_registered_solvers():
    """The configuration repeats the names because the command line must not import torch."""
    assert tuple(SOLVERS) == quant.SOLVERS


def test_solvers_are_registered_by_their_own_names():
    assert all(name == solver.name for name, solver in SOLVERS.items())
