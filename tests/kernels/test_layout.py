"""The layout: its sizes, its slices, and the groups of hqq."""

import pytest
import torch

from hqqtrain_kernels import Layout, pack

NBITS = (8, 4, 3, 2, 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("nbits", NBITS)
def test_whole_tiles_cost_exactly_nbits(nbits: int) -> None:
    layout = Layout(10, 256, nbits, 64, 1)
    assert 8 * layout.unit_bytes == nbits * 256


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", NBITS)
def test_a_slice_of_packed_units_is_the_packed_slice(nbits: int, axis: int) -> None:
    layout = Layout(24, 40, nbits, 8, axis)
    W = torch.randint(0, 1 << nbits, (24, 40), dtype=torch.uint8)
    whole = pack(as_units(W, layout), nbits)
    for start, stop in ((0, 1), (1, 3), (2, layout.units), (0, layout.units)):
        rows = torch.cat([W[part] for part in layout.rows_of(start, stop)])
        part = layout.slice(start, stop)
        assert rows.shape == (part.out_features, part.in_features)
        assert torch.equal(pack(as_units(rows, part), nbits), whole[start:stop])


def as_units(W: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [units, unit_codes], with rows r, r + units, ... of every class as hqq groups them."""
    if layout.axis == 1:
        return W
    classes = [W[r :: layout.units].T.flatten() for r in range(layout.units)]
    return torch.stack(classes)


def test_groups_of_axis_0_are_those_of_hqq() -> None:
    layout = Layout(12, 5, 8, 4, 0)
    W = torch.arange(60, dtype=torch.uint8).view(12, 5)
    hqq_groups = W.reshape(4, -1).T  # column j of hqq's [group_size, -1] is its group j
    assert torch.equal(as_units(W, layout).view(-1, 4), hqq_groups)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nbits": 5},
        {"axis": 2},
        {"group_size": 48},
        {"group_size": 0},
        {"out_features": 0},
        {"axis": 0, "group_size": 100},
    ],
)
def test_refuses_an_impossible_layout(wrong: dict[str, int]) -> None:
    sizes = {"out_features": 128, "in_features": 64, "nbits": 4, "group_size": 32, "axis": 1}
    with pytest.raises(ValueError, match=str(wrong[list(wrong)[-1]])):
        Layout(**(sizes | wrong))
