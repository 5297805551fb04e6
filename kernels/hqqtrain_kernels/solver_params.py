"""The solvers that the fused quantizer implements, and the numbers each of them takes.

This module imports neither torch nor triton, so that callers can ask for a solver's support on any
machine. The kernels contain no solver's constants: the caller passes them, and they are defined
once, next to the PyTorch code of the same solver.
"""

from typing import NamedTuple


class RTNParams(NamedTuple):
    """Round to nearest takes no numbers."""


class HQQParams(NamedTuple):
    """Numbers of hqq's solver.

    Attributes:
        rounds: Most rounds of a group.
        beta: hqq's beta, the weight of the quadratic penalty.
        p: hqq's p, the exponent of the norm of the residuals.
        nudges: Offsets of the zero that the 1-bit solver tries, to round ties either way.
        bits: Fixed-point bits for the mean of a group.
        shrunk_bits: Fixed-point bits for the mean of its shrunk residuals.
    """

    rounds: int
    beta: float
    p: float
    nudges: tuple[float, ...]
    bits: int
    shrunk_bits: int


class LeastSquaresParams(NamedTuple):
    """Numbers of the least-squares solver.

    Attributes:
        ranges_about_middle: Initial ranges about the middle of a group's range, as fractions of it.
        ranges_about_mean: Initial ranges about the group's mean, as fractions of twice the largest
            distance from the mean.
        rounds: Rounds from every starting point.
        last_rounds: Further rounds from the best fit of all starting points.
        relaxation: Over-relaxation factor of a round.
        bits: Fixed-point bits that resolve a group's range.
    """

    ranges_about_middle: tuple[float, ...]
    ranges_about_mean: tuple[float, ...]
    rounds: int
    last_rounds: int
    relaxation: float
    bits: int


class WeightedFitParams(NamedTuple):
    """Numbers of the fit of groups whose weights matter unequally.

    Attributes:
        ranges_about_middle: As in `LeastSquaresParams`.
        ranges_about_mean: The same, about the weighted mean.
        rounds: Rounds of rounding and regression from every starting point.
    """

    ranges_about_middle: tuple[float, ...]
    ranges_about_mean: tuple[float, ...]
    rounds: int


SolverParams = RTNParams | HQQParams | LeastSquaresParams

SUPPORTED_SOLVERS: dict[str, type[SolverParams]] = {
    "rtn": RTNParams,
    "hqq": HQQParams,
    "least_squares": LeastSquaresParams,
}
"""The type of the parameters of every solver that has a kernel."""
