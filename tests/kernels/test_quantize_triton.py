"""The fused quantizer gives the same bits as the reference in PyTorch.

On a GPU all bits are equal. Triton's interpreter has no fused multiply-add, so a weight midway
between two codes may be rounded the other way, and its group may get another result. The tests
count such groups, and allow few.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hqqtrain_kernels as kernels
from hqqtrain.common.errors import UserError
from hqqtrain.quant.quantize import QuantizedWeight, dequantize_weight, quantize_weight
from hqqtrain.quant.spec import QuantSpec
from hqqtrain_kernels import Layout, backend
from hqqtrain_kernels.solver_params import SUPPORTED_SOLVERS, HQQParams, RTNParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEW = 0.0 if DEVICE.type == "cuda" else 0.02
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# The interpreter is NumPy, which warns of divisions whose results the kernels then discard.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = [
    (4, 64, 1, BF16, (6, 256)), (2, 64, 1, BF16, (6, 256)), (3, 64, 1, FP16, (4, 192)),
    (1, 64, 1, BF16, (6, 256)), (8, 64, 1, FP32, (4, 192)), (2, 64, 0, BF16, (128, 40)),
    (4, 128, 0, FP16, (256, 9)), (2, 256, 1, BF16, (3, 512)), (4, 8, 1, BF16, (5, 104)),
    (3, 16, 0, BF16, (48, 50)), (1, 16, 1, FP32, (5, 80)), (2, 24, 1, BF16, (3, 48)),
    (3, None, 1, BF16, (2, 1000)), (2, 7, 0, FP32, (14, 5)), (8, 256, 0, FP32, (256, 5)),
    (1, 128, 1, BF16, (3, 512)), (3, 256, 1, BF16, (3, 512)), (1, 256, 0, BF16, (256, 40)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _back_to_auto() -> Iterator[None]:
    yield
    backend.set_backend("auto")


def by(name: str, W: Tensor, spec: QuantSpec) -> QuantizedWeight:
    backend.set_backend(name)
    return quantize_weight(W, spec)


def groups_that_differ(W: Tensor, spec: QuantSpec) -> float:
    """Return the share of groups that differ in a code, the scale or the zero."""
    layout = spec.layout(*W.shape)
    ours, theirs = by("triton", W, spec), by("torch", W, spec)

    def groups(q: QuantizedWeight) -> Tensor:
        codes = kernels.unpack(q.W_q, spec.nbits, layout.unit_codes)
        return codes.view(layout.units, layout.groups, -1)

    differs = (groups(ours) != groups(theirs)).any(-1)
    differs |= (ours.scale != theirs.scale) | (ours.zero != theirs.zero)
    if not differs.any():
        assert torch.equal(ours.W_q, theirs.W_q)  # padding included
    return differs.float().mean().item()


@pytest.mark.parametrize(
    ("solver", "nbits", "group_size", "axis", "meta_dtype", "shape"),
    [("least_squares", *case) for case in CASES]
    + [
        (solver, *case) for solver in ("hqq", "rtn") for case in (CASES if FEW == 0 else CASES[::2])
    ],
)
def test_same_bits_as_the_reference(solver, nbits, group_size, axis, meta_dtype, shape) -> None:
    torch.manual_seed(0)
    W = (torch.randn(shape, device=DEVICE) * 0.02).to(BF16)
    spec = QuantSpec(nbits, group_size, axis, solver, meta_dtype)
    assert groups_that_differ(W, spec) <= FEW


@pytest.mark.parametrize("nbits", [4, 2, 1])
def test_large_weights_take_the_shrinkage_branch(nbits: int) -> None:
    torch.manual_seed(0)
    W = torch.randn(4, 128, device=DEVICE)
    spec = QuantSpec(nbits, 64, 1, "hqq", FP32)
    assert groups_that_differ(W, spec) <= FEW
    assert (
        by("torch", W, spec).zero.ne(by("torch", W / 1024, spec).zero).any()
    )  # the branch has an effect


@pytest.mark.parametrize(
    ("nbits", "group_size", "axis", "shape"),
    [
        (2, 64, 1, (5, 448)), (1, 64, 1, (4, 448)), (3, 64, 1, (5, 448)), (1, 16, 1, (5, 80)),
        (4, 8, 1, (9, 72)), (2, 64, 0, (128, 12)), (1, 32, 0, (64, 5)), (3, 16, 0, (48, 20)),
        (4, 64, 1, (2, 8320)), (3, 8, 1, (1, 2400)),  # several programs to a row
        (2, 24, 1, (6, 96)), (1, 128, 1, (5, 512)), (2, 256, 1, (5, 512)),
    ],
)  # fmt: skip
def test_some_large_groups_are_deferred_to_the_second_launch(
    nbits, group_size, axis, shape
) -> None:
    """Ragged rows, cells of several groups, groups that threads share. Neighbors do not change."""
    torch.manual_seed(0)
    W = torch.randn(shape, device=DEVICE) * 0.002
    W = torch.where(torch.rand(shape, device=DEVICE) < 0.2 / group_size, W * 2000, W).to(BF16)
    spec = QuantSpec(nbits, group_size, axis, "hqq", BF16)
    backend.set_backend("triton")
    assert groups_that_differ(W, spec) <= FEW


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, QuantSpec]:
    """Draw any shape, scale, tail and dtype, also constant groups and weights on the grid."""
    g = draw(st.sampled_from([1, 3, 8, 16, 32, 64]))
    axis, nbits = draw(st.sampled_from([0, 1])), draw(st.sampled_from([8, 4, 3, 2, 1]))
    long, other = g * draw(st.integers(1, 3)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    W = torch.randn(long, other) * 10.0 ** draw(st.integers(-8, 4))
    W = W ** draw(st.sampled_from([1, 3])) + draw(st.sampled_from([0.0, 1.0]))
    if draw(st.booleans()):
        W[:, 0] = W[0, 0]
    W = W if axis == 0 else W.t()  # also not contiguous
    W = W.to(draw(st.sampled_from([BF16, FP32])))
    solver = draw(st.sampled_from(["rtn", "hqq", "least_squares"]))
    return W.to(DEVICE), QuantSpec(
        nbits, g, axis, solver, draw(st.sampled_from([BF16, FP16, FP32]))
    )


@given(weights())
@settings(max_examples=12 if DEVICE.type == "cpu" else 20, deadline=None, derandomize=True)
def test_the_error_of_any_weight_is_at_most_that_of_the_reference(
    case: tuple[Tensor, QuantSpec],
) -> None:
    W, spec = case
    layout, W64 = spec.layout(*W.shape), W.double()

    def error(name: str) -> float:
        return (
            (dequantize_weight(by(name, W, spec), layout, FP32).double() - W64)
            .square()
            .sum()
            .item()
        )

    if DEVICE.type == "cuda":
        assert groups_that_differ(W, spec) == 0
    assert error("triton") <= error("torch") * 1.05 + W64.square().sum().item() * 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("axis", "solver"), [(1, "rtn"), (0, "rtn"), (1, "least_squares"), (1, "hqq")]
)
def test_a_row_that_is_not_finite_is_reported(bad: float, axis: int, solver: str) -> None:
    W = torch.randn(64, 32, device=DEVICE)
    W[37, 5] = bad
    backend.set_backend("triton")
    with pytest.raises(UserError, match=r"q_proj: row 37 holds"):
        quantize_weight(W, QuantSpec(4, 32, axis, solver, BF16), name="q_proj")


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_with_a_stride(axis: int) -> None:
    whole = torch.randn(16, 96, device=DEVICE).to(BF16)
    spec = QuantSpec(4, 8, axis, "rtn", BF16)
    for W in (whole[:, 16:80], whole[::2], whole.t()[:16]):
        assert groups_that_differ(W, spec) == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU with 20 GiB: 2**32 weights")
@pytest.mark.parametrize("axis", [0, 1])
def test_more_than_2_to_the_31_weights(axis: int) -> None:
    W = torch.empty(1 << 16, (1 << 15) + 64, dtype=BF16, device=DEVICE).normal_()
    spec = QuantSpec(4, 64, axis, "rtn", BF16)
    q, layout = by("triton", W, spec), spec.layout(*W.shape)
    for units in (slice(0, 8), slice(layout.units - 8, layout.units)):
        rows = torch.cat([W[part] for part in layout.rows_of(units.start, units.stop)])
        expected = by("torch", rows, spec)
        assert torch.equal(q.W_q[units], expected.W_q)
        assert torch.equal(q.scale[units], expected.scale)


def test_a_solver_without_a_kernel_is_refused() -> None:
    """It must not be computed as if it were another solver."""
    from hqqtrain_kernels import quantize_triton

    W, layout = torch.randn(4, 64, device=DEVICE), Layout(4, 64, 4, 64, 1)
    assert set(SUPPORTED_SOLVERS) == {"rtn", "hqq", "least_squares"}
    with pytest.raises(ValueError, match=r"solver=newton: it has no kernel.*least_squares"):
        quantize_triton.quantize(W, layout, "newton", RTNParams(), BF16)
    with pytest.raises(ValueError, match=f"solver=hqq takes {HQQParams.__name__}"):
        quantize_triton.quantize(W, layout, "hqq", RTNParams(), BF16)
